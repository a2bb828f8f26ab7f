# SPDX-License-Identifier: Apache-2.0
"""The tables: every array has a home, no two share one, and there are as many as they have."""

import functools

import numpy as np
import pytest

from hubert_jax.interchange import fairseq, names
from tests import tiny
from tests.interchange import made

TABLES = {
    "hf": names.TRANSFORMERS | {x: names.FAIRSEQ[x] for x in ("head", "head.codes_CE")},
    "fairseq": names.FAIRSEQ,
    "torchaudio": names.TORCHAUDIO,
}
MASK = "encoder.mask_embedding_D"

# len(model.state_dict()) of transformers 5.24 (HubertModel, HubertForCTC), torchaudio 2.11
# (wav2vec2_model without and with aux_num_out, hubert_pretrain_model) and fairseq 0.12.2
# (HubertModel; HubertCtc without its label_embs_concat), with conv_bias=False; 7 more with it.
NUM_TENSORS = {
    ("base", 12): {"hf": (211, 213), "torchaudio": (210, 212, 214), "fairseq": (214, 213)},
    ("large", 24): {"hf": (415, 417), "torchaudio": (414, 416, 418), "fairseq": (418, 417)},
    ("large", 48): {"hf": (799, 801), "torchaudio": (798, 800, 802), "fairseq": (802, 801)},
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("conv_bias", [False, True])
def test_every_array_has_a_home_of_its_own(table, kind, conv_bias):
    """Filled with numbers that occur once, all come through both ways and none twice."""
    for outputs in ("both", "two sets, untied"):
        model = made.model(kind, outputs, conv_bias=conv_bias)
        starts = np.cumsum([0, *(x.size for x in model.arrays.values())])
        arrays = {
            name: np.arange(start, start + x.size, dtype=np.float32).reshape(x.shape)
            for start, (name, x) in zip(starts, model.arrays.items(), strict=False)
        }
        assert starts[-1] < 2**24  # which float32 counts exactly
        state = names.to_theirs(arrays, TABLES[table], spelling=names.NEW_SPELLING)
        numbers = np.concatenate([x.reshape(-1) for x in state.values()])
        np.testing.assert_array_equal(np.sort(numbers), np.arange(starts[-1]))
        back = names.to_ours(state, model.shapes(), TABLES[table], origin="here")
        for name, array in arrays.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize(("kind", "num_layers"), NUM_TENSORS)
def test_there_are_as_many_tensors_as_in_their_models(kind, num_layers):
    """Of the published depths; widths do not change the number."""
    expected = NUM_TENSORS[kind, num_layers]

    def count(table, outputs, *, conv_bias, without=()):
        model = made.model(kind, outputs, num_layers=num_layers, conv_bias=conv_bias)
        arrays = {name: x for name, x in model.arrays.items() if name not in without}
        return len(names.to_theirs(arrays, table, spelling=names.OLD_SPELLING))

    for conv_bias, more in ((False, 0), (True, 7)):
        of = functools.partial(count, conv_bias=conv_bias)
        counts = {
            "hf": (of(names.TRANSFORMERS, "bare"), of(names.TRANSFORMERS, "ctc")),
            "torchaudio": (
                of(names.TORCHAUDIO, "bare", without=(MASK,)),
                of(names.TORCHAUDIO, "ctc", without=(MASK,)),
                of(names.TORCHAUDIO, "one set"),
            ),
            "fairseq": (of(names.FAIRSEQ, "one set"), of(names.FAIRSEQ, "ctc")),
        }
        assert counts == {
            format_: tuple(number + more for number in numbers)
            for format_, numbers in expected.items()
        }


def test_fairseqs_layer_norms_lie_deeper():
    """A Sequential of TransposeLast, LayerNorm, TransposeLast; the group norm stands alone."""
    for conv_norm, path in (("group", "conv_layers.0.2.weight"), ("layer", "conv_layers.0.2.1.")):
        model = made.model("base" if conv_norm == "group" else "large")
        table = fairseq.table_for(conv_norm, is_fine_tuned=False)
        state = names.to_theirs(model.arrays, table, spelling=names.OLD_SPELLING)
        assert any(path in name for name in state)
    table = fairseq.table_for("layer", is_fine_tuned=True)
    assert table["ctc"] == "w2v_encoder.proj"
    assert table["encoder.norm"] == "w2v_encoder.w2v_model.encoder.layer_norm"


def test_layouts_are_those_of_torch():
    """Against the products that a Linear and a Conv1d of torch are, written out."""
    model = made.model("base", "two sets, untied")
    arrays, config = model.arrays, model.config
    state = names.to_theirs(arrays, names.FAIRSEQ, spelling=names.OLD_SPELLING)
    x_TD = np.random.default_rng(0).normal(size=(5, config.width))
    layer = "encoder.layers.1.self_attn."
    want_THK = np.einsum(
        "td,dhk->thk", x_TD, arrays["encoder.layers.attention.qkv.kernel"][1, :, 1]
    )
    got_TD = x_TD @ state[layer + "k_proj.weight"].T
    np.testing.assert_allclose(got_TD, want_THK.reshape(5, -1), rtol=1e-5, atol=1e-5)
    out_HKD = arrays["encoder.layers.attention.out.kernel"][1]
    want_TD = np.einsum("thk,hkd->td", x_TD.reshape(5, *out_HKD.shape[:2]), out_HKD)
    got_TD = x_TD @ state[layer + "out_proj.weight"].T
    np.testing.assert_allclose(got_TD, want_TD, rtol=1e-5, atol=1e-5)
    # fairseq splits final_proj's output into one piece per label set (chunk of the last axis).
    first, second = np.split(x_TD @ state["final_proj.weight"].T, 2, axis=1)
    np.testing.assert_allclose(first, x_TD @ arrays["head.kernel"][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, x_TD @ arrays["head.kernel"][1], rtol=1e-5, atol=1e-5)
    convs = "encoder.extractor.convs.1.kernel"
    np.testing.assert_array_equal(
        state["feature_extractor.conv_layers.1.0.weight"][3, 2], arrays[convs][:, 2, 3]
    )


def test_what_a_format_has_no_place_for_is_named():
    arrays = made.model("base", "one set").arrays
    with pytest.raises(ValueError, match=r"no place for head\.bias, head\.codes_CE, head\.kernel"):
        names.to_theirs(arrays, names.TRANSFORMERS, spelling=names.NEW_SPELLING)
