# SPDX-License-Identifier: Apache-2.0
"""Their own models, tiny and random: read, computed with, written, and loaded by them again.

Runs where torch, transformers and torchaudio are installed (.ci/run installs them after the other
tests). test_fairseq_files.py has fairseq; tests/interchange has what needs no torch.
"""

import functools
import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import torchaudio
import transformers

from hubert_jax import weights
from hubert_jax.data import batches
from hubert_jax.heads import Hubert, Weights
from hubert_jax.interchange import formats, names
from hubert_jax.ops import frames
from tests import tiny
from tests.interchange import made

KINDS = {"base": ("group", False), "large": ("layer", True)}
WAVE_BS = np.random.default_rng(0).normal(size=(2, 8_000)).astype(np.float32)
TOLERANCE = dict(atol=1e-4, rtol=1e-4)


def perturb(model):
    """Every parameter off its first value, so that no zero or one hides an exchange."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(model: Weights) -> Hubert:
    return weights.from_named(model.abstract(), jax.tree.map(jax.numpy.asarray, model.arrays))


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# transformers.


def hubert_of_transformers(kind, cls, *, conv_bias):
    conv_norm, pre_norm = KINDS[kind]
    config = transformers.HubertConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=3,
        conv_dim=(16,) * 7, conv_bias=conv_bias, num_conv_pos_embedding_groups=4,
        feat_extract_norm=conv_norm, do_stable_layer_norm=pre_norm, vocab_size=7,
        attn_implementation="eager", ctc_zero_infinity=True, layerdrop=0.0,
    )  # fmt: skip
    return perturb(cls(config))


def preprocessor(*, do_normalize):
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv_bias", [False, True])
def test_a_hubert_model_of_transformers(kind, conv_bias, tmp_path):
    theirs = hubert_of_transformers(kind, transformers.HubertModel, conv_bias=conv_bias)
    theirs.save_pretrained(tmp_path / "theirs")
    preprocessor(do_normalize=conv_bias).save_pretrained(tmp_path / "theirs")
    model = formats.read(tmp_path / "theirs", format_="hf")
    assert model.config.normalize_audio is conv_bias and model.head is None and model.ctc is None
    with torch.no_grad():
        output = theirs(torch.from_numpy(WAVE_BS), output_hidden_states=True)
    encoder = ours(model).encoder
    hidden = [layer_BTD.numpy() for layer_BTD in output.hidden_states]
    for layer in range(4 if kind == "base" else 3):  # large: their last one has the last norm
        got_BTD = encoder.features(WAVE_BS, layer=layer)
        np.testing.assert_allclose(got_BTD, hidden[layer], **TOLERANCE)
        if layer:
            assert np.abs(hidden[layer] - hidden[layer - 1]).max() > 0.1
    last_BTD = output.last_hidden_state.numpy()
    np.testing.assert_allclose(
        encoder.contextualize(encoder.extract(WAVE_BS)), last_BTD, **TOLERANCE
    )

    formats.write(model, tmp_path / "ours", format_="hf")
    loaded, report = transformers.HubertModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert_same_state(loaded, theirs)
    differing = {
        key
        for key, value in theirs.config.to_dict().items()
        if loaded.config.to_dict()[key] != value
    }
    # What our model has no field for, or what they fill in when they load.
    assert differing <= {"ctc_zero_infinity", "vocab_size", "_name_or_path", "dtype",
                         "architectures"}, differing  # fmt: skip
    made.assert_same(model, formats.read(tmp_path / "ours", format_="hf"))


def sharded(theirs, folder):
    theirs.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def in_old_spelling(theirs, folder, *, suffix="safetensors"):
    """As transformers wrote it with torch before 2.1, and as many files on its hub still are."""
    theirs.save_pretrained(folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    old = names.respelled(state, names.OLD_SPELLING)
    assert old.keys() != state.keys()
    if suffix == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(old, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(old, folder / "model.safetensors", metadata={"format": "pt"})


def bin_in_shards(theirs, folder):
    in_old_spelling(theirs, folder, suffix="bin")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({n: x for n, x in state.items() if places[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    "save",
    [
        sharded, in_old_spelling, functools.partial(in_old_spelling, suffix="bin"), bin_in_shards,
    ],
    ids=["sharded", "old spelling", "bin", "bin in shards"],
)  # fmt: skip
@pytest.mark.parametrize("cls", [transformers.HubertModel, transformers.HubertForCTC])
def test_all_the_files_that_transformers_has_written(save, cls, tmp_path):
    theirs = hubert_of_transformers("large", cls, conv_bias=True)
    theirs.save_pretrained(tmp_path / "plain")
    save(theirs, tmp_path / "other")
    made.assert_same(
        formats.read(tmp_path / "plain", format_="hf"),
        formats.read(tmp_path / "other", format_="hf"),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_of_transformers_widen_exactly(dtype, tmp_path):
    theirs = hubert_of_transformers("base", transformers.HubertModel, conv_bias=False).to(dtype)
    theirs.save_pretrained(tmp_path / "safetensors")
    model = formats.read(tmp_path / "safetensors", format_="hf")
    formats.write(model, tmp_path / "ours", format_="hf")
    loaded = transformers.HubertModel.from_pretrained(tmp_path / "ours")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name
        assert tensor.dtype == dtype


VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6}


@pytest.fixture
def ctc_of_transformers(tmp_path):
    """HubertForCTC with its processor, as a recipe of transformers leaves it."""
    theirs = hubert_of_transformers("large", transformers.HubertForCTC, conv_bias=True)
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    transformers.Wav2Vec2Processor(preprocessor(do_normalize=False), tokenizer).save_pretrained(
        tmp_path / "theirs"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs


def test_a_ctc_model_of_transformers(ctc_of_transformers, tmp_path):
    theirs = ctc_of_transformers
    model = formats.read(tmp_path / "theirs", format_="hf")
    assert model.ctc == made.CtcConfig(tuple(VOCABULARY), 0)
    assert model.config.normalize_audio is False  # not what is usual for this kind
    with torch.no_grad():
        want_BTV = theirs(torch.from_numpy(WAVE_BS)).logits.numpy()
    np.testing.assert_allclose(ours(model).symbols(WAVE_BS), want_BTV, **TOLERANCE)
    assert np.ptp(want_BTV, axis=-1).min() > 0.01

    formats.write(model, tmp_path / "ours", format_="hf")
    loaded, report = transformers.HubertForCTC.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert_same_state(loaded, theirs)
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "ours")
    assert processor.feature_extractor.do_normalize is False
    assert decoded(processor) == decoded(
        transformers.Wav2Vec2Processor.from_pretrained(tmp_path / "theirs")
    )


def decoded(processor):
    """Repetitions fall together, the blank parts them and is not written, | is a space."""
    ids = [0, 6, 6, 0, 6, 5, 0, 0, 4, 4, 5, 0, 5, 5, 0]
    text = processor.decode(ids)
    assert text == "TTE EE"
    return text


def test_the_blank_of_a_model_from_fairseq_is_decoded(tmp_path):
    """Its name there is <s>, and <pad> is a symbol that never comes."""
    model = made.model("base", "ctc")
    formats.write(model, tmp_path, format_="hf")
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    assert processor.tokenizer.pad_token_id == model.ctc.blank == 0
    assert processor.tokenizer.get_vocab() == {
        symbol: i for i, symbol in enumerate(model.ctc.symbols)
    }
    decoded(processor)
    assert processor.tokenizer("TE E").input_ids == [6, 5, 4, 5]


@pytest.mark.parametrize("normalize_audio", [False, True])
def test_audio_goes_through_the_exported_extractor(normalize_audio, tmp_path):
    """From a wave, by AutoFeatureExtractor and HubertModel, to our features of it."""
    model = made.model("large", normalize_audio=normalize_audio, unroll="yes")
    formats.write(model, tmp_path, format_="hf")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.do_normalize is normalize_audio
    assert extractor.sampling_rate == frames.SAMPLE_RATE
    wave_S = 0.1 * WAVE_BS[0] + 0.02
    inputs = extractor(wave_S, sampling_rate=16_000, return_tensors="pt")
    theirs = transformers.HubertModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want_BTD = theirs(inputs.input_values, output_hidden_states=True).hidden_states[2].numpy()
    encoder = ours(model).encoder
    waves = {True: batches.normalized(wave_S)[None], False: wave_S[None]}
    got_BTD = encoder.features(waves[normalize_audio], layer=2)
    np.testing.assert_allclose(got_BTD, want_BTD, **TOLERANCE)
    other_BTD = encoder.features(waves[not normalize_audio], layer=2)
    assert np.abs(other_BTD - want_BTD).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_fine_tuned_there(kind, tmp_path):
    """An exported encoder gets a new CTC output from transformers, and takes one step."""
    formats.write(made.model(kind, "one set"), tmp_path, format_="hf")
    theirs = transformers.HubertForCTC.from_pretrained(
        tmp_path, vocab_size=7, pad_token_id=0, ctc_zero_infinity=True
    ).train()
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    labels = torch.tensor([[5, 6, 4, 5], [6, 6, 5, -100]])
    loss = theirs(torch.from_numpy(WAVE_BS), labels=labels).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and loss > 0
    for name, parameter in theirs.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if parameter.grad is None:  # the mask embedding, when nothing was drawn to be masked
            assert name == "hubert.masked_spec_embed"
        else:
            assert not torch.equal(parameter, before[name]), name
    theirs.save_pretrained(tmp_path / "tuned")
    tuned = formats.read(tmp_path / "tuned", format_="hf")
    assert tuned.head is None and len(tuned.ctc.symbols) == 7


# torchaudio.


def model_of_torchaudio(kind, outputs):
    config = tiny.KINDS[kind]
    common = dict(
        extractor_mode={"group": "group_norm", "layer": "layer_norm"}[config.conv_norm],
        extractor_conv_layer_config=[(16, *conv) for conv in frames.CONV_LAYERS],
        extractor_conv_bias=False, encoder_embed_dim=32, encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=128, encoder_pos_conv_groups=4, encoder_num_layers=3,
        encoder_num_heads=4, encoder_attention_dropout=0.0, encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_drop=0.0,
        encoder_layer_norm_first=config.pre_norm,
    )  # fmt: skip
    if outputs == "one set":
        return perturb(torchaudio.models.hubert_pretrain_model(
            **common, mask_prob=0.8, mask_selection="static", mask_other=0.0, mask_length=10,
            no_mask_overlap=False, mask_min_space=1, mask_channel_prob=0.0,
            mask_channel_selection="static", mask_channel_other=0.0, mask_channel_length=10,
            no_mask_channel_overlap=False, mask_channel_min_space=1, skip_masked=False,
            skip_nomask=False, num_classes=12, final_dim=8, feature_grad_mult=0.1,
        ))  # fmt: skip
    num_symbols = 7 if outputs == "ctc" else None
    return perturb(torchaudio.models.wav2vec2_model(**common, aux_num_out=num_symbols))


@pytest.mark.parametrize("outputs", ["one set", "bare", "ctc"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_torchaudio(kind, outputs, tmp_path):
    theirs = model_of_torchaudio(kind, outputs)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    model, other = (
        formats.read(tmp_path / f"theirs{suffix}", format_="torchaudio", num_heads=4)
        for suffix in formats.SUFFIXES
    )
    made.assert_same(model, other)
    assert model.num_codes == ((12,) if outputs == "one set" else ())
    wav2vec2 = theirs.wav2vec2 if outputs == "one set" else theirs
    with torch.no_grad():
        hidden, _ = wav2vec2.extract_features(torch.from_numpy(WAVE_BS))
        logits_BTV, _ = wav2vec2(torch.from_numpy(WAVE_BS))
    hubert = ours(model)
    for layer, hidden_BTD in enumerate(hidden, start=1):
        got_BTD = hubert.encoder.features(WAVE_BS, layer=layer)
        np.testing.assert_allclose(got_BTD, hidden_BTD.numpy(), **TOLERANCE)
    if outputs == "ctc":
        np.testing.assert_allclose(hubert.symbols(WAVE_BS), logits_BTV.numpy(), **TOLERANCE)

    for suffix, load in (
        (".pt", functools.partial(torch.load, weights_only=True)),
        (".safetensors", safetensors.torch.load_file),
    ):
        folder = tmp_path / f"ours{suffix}"
        formats.write(model, folder, format_="torchaudio", suffix=suffix)
        call = json.loads((folder / "torchaudio.json").read_text())
        loaded = getattr(torchaudio.models, call["function"])(**call["arguments"])
        loaded.load_state_dict(load(folder / f"model{suffix}"), strict=True)
        assert_same_state(loaded, theirs)
        made.assert_same(model, formats.read(folder, format_="torchaudio"))


def test_logits_are_those_of_torchaudio():
    """So the rows of the codes are not shifted: all frames masked, in both the mask embedding."""
    theirs = model_of_torchaudio("base", "one set")
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    table = names.within(
        names.TORCHAUDIO, "wav2vec2.", but=("encoder.mask_embedding_D", "head", "head.codes_CE")
    )
    model = made.model("base", "one set")
    arrays = names.to_ours(state, model.shapes(), table, origin="here")
    hubert = ours(model._replace(arrays=arrays))
    x_BTD = np.random.default_rng(1).normal(size=(1, 5, 32)).astype(np.float32)
    labels = torch.arange(5)[None]
    mask = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        want_NC, _ = theirs.logit_generator(torch.from_numpy(x_BTD), labels, mask, ~mask)
    (got_BTC,) = hubert.head(jax.numpy.asarray(x_BTD))
    # Theirs has the right code's logit first, then all codes with the right one struck out.
    np.testing.assert_allclose(np.diagonal(got_BTC[0, :, :5]), want_NC[:, 0].numpy(), **TOLERANCE)
    for t in range(5):
        others = np.delete(np.asarray(got_BTC[0, t]), t)
        want = np.delete(want_NC[t, 1:].numpy(), t)
        np.testing.assert_allclose(others, want, **TOLERANCE)
