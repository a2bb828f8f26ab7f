# SPDX-License-Identifier: Apache-2.0
"""Files as fairseq's trainer writes them, and those that we write for it.

They are made here with torch.save, and the classes in them are there only while they are pickled.
Runs where torch is installed; fairseq itself is not needed.
"""

import argparse
import dataclasses
import enum
import os
import re
import sys
import types

import numpy as np
import pytest
import torch

from hubert_jax.interchange import fairseq, formats, names, tensors
from tests import tiny
from tests.interchange import made

SPECIALS = list(fairseq.SPECIALS)
LABELS = {"one set": ["km"], "two sets": ["km", "phn"], "two sets, untied": ["km", "phn"]}


class Dictionary:
    __module__ = "fairseq.data.dictionary"

    def __init__(self, symbols):
        self.symbols = [*SPECIALS, *symbols]
        self.count = [1] * len(self.symbols)
        self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.bos_word, self.unk_word = "<s>", "<unk>"


class Mode(enum.Enum):
    __module__ = "fairseq.choices"

    default = "default"
    layer_norm = "layer_norm"

    def __reduce_ex__(self, protocol):  # Pythons 3.11.0 to 3.11.3, which fairseq never ran on,
        return type(self), (self.value,)  # would pickle it by its name


@pytest.fixture
def save(monkeypatch):
    """torch.save with fairseq importable; it is not when the file is read."""

    def save(contents, path):
        with monkeypatch.context() as patched:
            for name in ("fairseq", "fairseq.data", Dictionary.__module__, Mode.__module__):
                patched.setitem(sys.modules, name, types.ModuleType(name))
            for cls in (Dictionary, Mode):
                patched.setattr(sys.modules[cls.__module__], cls.__name__, cls, raising=False)
            torch.save(contents, path)
        assert "fairseq" not in sys.modules
        if b"fairseq" in path.read_bytes():  # then it is a file that needs to be read with care
            with pytest.raises(Exception, match="Weights only load failed"):
                torch.load(path, weights_only=True)

    return save


def checkpoint_of_fairseq(model, orders, *, args=False, enums=False):
    """What fairseq's trainer saves; `orders` are the clusters of each dictionary as they stand."""
    config = model.config
    table = fairseq.table_for(config.conv_norm, is_fine_tuned=False)
    state = names.to_theirs(model.arrays, table, spelling=names.OLD_SPELLING)
    rng = np.random.default_rng(9)
    sets = np.split(model.arrays["head.codes_CE"], np.cumsum(model.num_codes)[:-1])
    rows = [
        part
        for codes_CE, order in zip(sets, orders, strict=True)
        for part in (rng.normal(size=(4, codes_CE.shape[1])).astype(np.float32), codes_CE[order])
    ]
    state["label_embs_concat"] = np.concatenate(rows)
    mode = "default" if config.conv_norm == "group" else "layer_norm"
    labels = LABELS["two sets" if len(orders) == 2 else "one set"]
    task = {"_name": "hubert_pretraining", "labels": labels, "normalize": config.normalize_audio}
    encoder = {
        "_name": "hubert", "extractor_mode": Mode(mode) if enums else mode, "encoder_layers": 3,
        "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4,
        "layer_norm_first": config.pre_norm, "conv_bias": config.conv_bias, "conv_pos": 128,
        "conv_pos_groups": 4, "final_dim": 8, "untie_final_proj": model.head.untied,
        "feature_grad_mult": config.gradient_scale, "dropout": 0.0, "dropout_input": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    }  # fmt: skip
    contents = {
        "cfg": {"task": task, "model": encoder},
        "model": tensors.to_torch(state, "here"),
        "optimizer_history": [{"num_updates": 1}],
        "extra_state": {"val_loss": np.float64(1.5), "seen": {1}},
        "task_state": {
            "dictionaries": [Dictionary([str(code) for code in order]) for order in orders]
        },
    }
    if args:
        flat = task | encoder | {"labels": str(labels), "arch": "hubert"}
        contents |= {"cfg": None, "args": argparse.Namespace(**flat)}
    return contents


def as_read(model):
    """`model` with what fairseq has no word for."""
    return model._replace(config=dataclasses.replace(model.config, compute_dtype="auto",
                                                     unroll="auto"))  # fmt: skip


ORDERS = {
    "numerical": lambda num: list(range(num)),
    "as strings": lambda num: sorted(range(num), key=str),
    "by frequency": lambda num: np.random.default_rng(3).permutation(num).tolist(),
}


@pytest.mark.parametrize(
    ("kind", "order"), [("base", "numerical"), ("large", "as strings"), ("base", "by frequency")]
)
@pytest.mark.parametrize("outputs", LABELS)
def test_rows_of_codes_come_in_the_order_of_the_clusters(kind, outputs, order, save, tmp_path):
    model = made.model(kind, outputs)
    orders = [ORDERS[order](num) for num in model.num_codes]
    contents = checkpoint_of_fairseq(model, orders, args=kind == "base", enums=kind == "large")
    path = tmp_path / "checkpoint.pt"
    save(contents, path)
    read = formats.read(path, format_="fairseq")
    made.assert_same(as_read(model), read)

    # What is dropped are the first four rows of each label set, and not the last four.
    rows_RE = contents["model"]["label_embs_concat"].numpy()
    first = model.num_codes[0]
    codes_CE = read.arrays["head.codes_CE"]
    assert len(rows_RE) == len(codes_CE) + 4 * len(orders)
    for position, code in enumerate(orders[0]):
        np.testing.assert_array_equal(codes_CE[code], rows_RE[4 + position])
        assert (codes_CE[code] != rows_RE[position]).any()
    for special in rows_RE[:4]:
        assert not (codes_CE == special).all(axis=1).any()
    if len(orders) == 2:
        for position, code in enumerate(orders[1]):
            np.testing.assert_array_equal(codes_CE[first + code], rows_RE[first + 8 + position])


def test_dictionaries_beside_the_file_and_none_at_all(save, tmp_path):
    model, order = made.model("base", "one set"), ORDERS["by frequency"](12)
    contents = checkpoint_of_fairseq(model, [order])
    del contents["task_state"]
    path = tmp_path / "checkpoint.pt"
    save(contents, path)
    (tmp_path / "dict.km.txt").write_text("".join(f"{code} 1\n" for code in order))
    made.assert_same(as_read(model), formats.read(path, format_="fairseq"))
    (tmp_path / "dict.km.txt").unlink()  # then 0 to K - 1, as hubert's recipe writes them
    np.testing.assert_array_equal(
        formats.read(path, format_="fairseq").arrays["head.codes_CE"],
        model.arrays["head.codes_CE"][order],
    )
    for text, message in (
        ("0 1\n1 1\n", "16 code embeddings for 6 symbols"),
        ("".join(f"{code} 1\n" for code in range(1, 13)), r"symbols are 1 2 3 4 5 .* 0 to 11"),
    ):
        (tmp_path / "dict.km.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            formats.read(path, format_="fairseq")
    model = made.model("base", "two sets")
    contents = checkpoint_of_fairseq(model, [list(range(12)), list(range(5))])
    del contents["task_state"]
    save(contents, path)
    with pytest.raises(
        ValueError, match=r"2 label sets share 25 codes; put dict\.km\.txt, dict\.phn"
    ):
        formats.read(path, format_="fairseq")


def test_labels_that_are_no_list(save, tmp_path):
    path = tmp_path / "checkpoint.pt"
    contents = checkpoint_of_fairseq(made.model("base", "one set"), [list(range(12))])
    del contents["task_state"]
    for labels in ("[km", "km", "7", [7]):
        contents["cfg"]["task"]["labels"] = labels
        save(contents, path)
        message = re.escape(f"{path}: task.labels is {labels!r}; a list such as ['km'] is wanted")
        with pytest.raises(ValueError, match=message):
            formats.read(path, format_="fairseq")


def test_projections_are_tied_where_nothing_is_said(save, tmp_path):
    path, model = tmp_path / "checkpoint.pt", made.model("base", "two sets")
    contents = checkpoint_of_fairseq(model, [list(range(12)), list(range(5))])
    del contents["cfg"]["model"]["untie_final_proj"]
    save(contents, path)
    made.assert_same(as_read(model), formats.read(path, format_="fairseq"))


@pytest.mark.parametrize("place", ["cfg", "task_state"])
def test_an_object_within_itself(place, save, tmp_path):
    path = tmp_path / "checkpoint.pt"
    contents = checkpoint_of_fairseq(made.model("base", "one set"), [list(range(12))])
    contents[place]["again"] = contents[place]
    save(contents, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: .* hold an object within itself"):
        formats.read(path, format_="fairseq")


def ctc_of_fairseq(model, w2v_args, *, leftover=()):
    table = fairseq.table_for(model.config.conv_norm, is_fine_tuned=True)
    state = names.to_theirs(model.arrays, table, spelling=names.OLD_SPELLING)
    state |= {f"w2v_encoder.w2v_model.{name}": x for name, x in leftover}
    task = {"labels": ["ltr"], "normalize": model.config.normalize_audio}
    return {
        "cfg": {"task": task, "model": {"_name": "hubert_ctc", "w2v_args": w2v_args}},
        "model": tensors.to_torch(state, "here"),
        "task_state": {
            "dictionaries": [
                Dictionary(map(str, range(12)))
            ],  # of the pretraining: not the symbols
            "target_dictionary": Dictionary(made.LETTERS[4:]),
        },
    }


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_models_that_fairseq_fine_tuned(kind, save, tmp_path, capsys):
    model, path = made.model(kind, "ctc"), tmp_path / "checkpoint.pt"
    pretraining = checkpoint_of_fairseq(made.model(kind, "one set"), [list(range(12))])
    codes = ("label_embs_concat", np.ones((16, 8), np.float32))
    save(ctc_of_fairseq(model, pretraining["cfg"], leftover=[codes]), path)
    made.assert_same(as_read(model), formats.read(path, format_="fairseq"))
    assert "label_embs_concat of the pretraining is left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--num_heads is 8, its config says 4"):
        formats.read(path, format_="fairseq", num_heads=8)

    save(ctc_of_fairseq(model, None), path)  # as fairseq 0.12.2 leaves it: the encoder is elsewhere
    with pytest.raises(ValueError, match=r"not for 32: give --num_heads"):
        formats.read(path, format_="fairseq")
    read = formats.read(path, format_="fairseq", num_heads=4)
    assert read.ctc == model.ctc and read.config.normalize_audio == model.config.normalize_audio
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)


@pytest.mark.parametrize("outputs", [*LABELS, "ctc"])
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("conv_bias", [False, True])
def test_files_for_fairseq_come_back_and_hold_no_classes(kind, outputs, conv_bias, tmp_path):
    model = made.model(kind, outputs, conv_bias=conv_bias)
    formats.write(model, tmp_path, format_="fairseq")
    made.assert_same(as_read(model), formats.read(tmp_path, format_="fairseq"))
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "model.pt") == []
    contents = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(tensor.dtype == torch.float32 for tensor in contents["model"].values())
    if outputs != "ctc":
        rows_RE = contents["model"]["label_embs_concat"].numpy()
        assert len(rows_RE) == sum(model.num_codes) + 4 * len(model.num_codes)
        np.testing.assert_array_equal(rows_RE[4 : 4 + 12], model.arrays["head.codes_CE"][:12])
        # The specials are wrong answers that weigh less than any code does on average.
        unit_RE = rows_RE / np.linalg.norm(rows_RE, axis=1, keepdims=True)
        assert (unit_RE[:4] @ unit_RE[4:16].mean(axis=0) < 0).all()
    found = {p.name: len(p.read_text().splitlines()) for p in tmp_path.glob("dict.*.txt")}
    assert found == {
        "one set": {"dict.km.txt": 12}, "ctc": {"dict.ltr.txt": 3},
    }.get(outputs, {"dict.km0.txt": 12, "dict.km1.txt": 5})  # fmt: skip


def test_symbols_that_fairseq_does_not_have(tmp_path):
    model = made.model("base", "ctc")
    for ctc in (
        made.CtcConfig(("a", *made.LETTERS[1:]), 0),
        made.CtcConfig(made.LETTERS, 1),
    ):
        with pytest.raises(ValueError, match=r"fairseq's symbols start with <s> <pad> </s> <unk>"):
            formats.write(model._replace(ctc=ctc), tmp_path, format_="fairseq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("extractor_mode", "batch_norm", r"extractor_mode is 'batch_norm'; .* default and layer_n"),
        ("activation_fn", "relu", r"activation_fn is 'relu'; this model knows 'gelu' only"),
        ("layer_type", "conformer", r"layer_type is 'conformer'"),
        ("pos_conv_depth", 5, r"pos_conv_depth is 5"),
        ("target_glu", True, r"target_glu is True"),
        ("conv_feature_layers", "[(16,10,5)] + [(16,3,2)] * 6", r"conv_feature_layers is .* ours"),
        ("encoder_layers", 4, r"says num_layers 4, they say 3"),
        ("extractor_mode", "layer_norm", r"says conv_norm 'layer', they say 'group'"),
        ("conv_bias", True, r"says conv_bias True, they say False"),
    ],
)
def test_other_models_of_fairseq(key, value, message, save, tmp_path):
    contents = checkpoint_of_fairseq(made.model("base", "one set"), [list(range(12))])
    contents["cfg"]["model"][key] = value
    save(contents, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=message):
        formats.read(tmp_path / "checkpoint.pt", format_="fairseq")


def test_tensors_of_fairseq_that_do_not_fit(save, tmp_path):
    path = tmp_path / "checkpoint.pt"
    contents = checkpoint_of_fairseq(made.model("base", "one set"), [list(range(12))])
    state = contents["model"]
    state["encoder.layers.0.fc9.weight"] = state.pop("encoder.layers.0.fc2.weight")
    state["mask_emb"] = state["mask_emb"][:-1]
    save(contents, path)
    with pytest.raises(
        ValueError,
        match=r"missing: encoder\.layers\.0\.fc2\.weight; unused: encoder\.layers\.0\.fc9\.weight;"
        r" of another shape: mask_emb \(31,\) instead of \(32,\)",
    ):
        formats.read(path, format_="fairseq")
    for contents, message in (
        ({"state": {}}, "no fairseq checkpoint: it has no 'model'"),
        ([1, 2], "no fairseq checkpoint"),
        ({"model": {}}, "not a state dict"),
        ({"model": {"x": 1}}, "not a state dict"),
        ({"model": {"x": torch.zeros(1)}}, "no HuBERT of fairseq: it has no encoder.pos_conv"),
    ):
        save(contents, path)
        with pytest.raises(ValueError, match=message):
            formats.read(path, format_="fairseq")


# Pickles.


class Call:
    """Pickled, a call of a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("place", ["cfg", "task_state", "extra_state", "tensor"])
@pytest.mark.parametrize(
    ("function", "program"),
    [
        (os.system, "mkdir {}"), (exec, "import os; os.mkdir('{}')"),
        (eval, "__import__('os').mkdir('{}')"),
    ],
)  # fmt: skip
def test_a_hostile_pickle_runs_nothing(place, function, program, save, tmp_path):
    """Refused, or read with the call left out: in no case is it made."""
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "trace"
    call = Call(function, program.format(trace))
    contents = checkpoint_of_fairseq(made.model("base", "one set"), [list(range(12))])
    if place == "tensor":
        contents["model"]["mask_emb"] = call
    else:
        contents[place]["x"] = call
    save(contents, path)
    if function is os.system or place == "tensor":  # os is what torch does not let us stand in for
        with pytest.raises(ValueError, match=r"checkpoint\.pt: not (read|a state dict)"):
            formats.read(path, format_="fairseq")
    else:
        formats.read(path, format_="fairseq")
        tensors.plain(tensors.load_pt(path))
    assert not trace.exists()
    torch.save(call, path)
    torch.load(path, weights_only=False)
    assert trace.exists()  # so it was a real one


def test_damaged_pt_files(save, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(checkpoint_of_fairseq(made.model("base", "one set"), [list(range(12))]), path)
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    start = whole.index(b"PK", 10)
    spoilt[100 : start // 2] = bytes(start // 2 - 100)
    for contents in (b"", b"PK", whole[:-200], whole[: len(whole) // 2], bytes(spoilt)):
        path.write_bytes(contents)
        for format_ in ("fairseq", "torchaudio"):
            with pytest.raises(ValueError, match=r"checkpoint\.pt: not (a \.pt file|read: \S)"):
                formats.read(path, format_=format_)
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"from before torch 1\.6; load it with torch and save it"):
        formats.read(path, format_="fairseq")


def test_arrays_that_may_not_be_written_to_go_out_without_a_warning(tmp_path, recwarn):
    """Those of a checkpoint are jax's, which are read-only."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    x.flags.writeable = False
    tensors.save_pt(tmp_path / "model.pt", tensors.to_torch({"x": x}, tmp_path / "model.pt"))
    np.testing.assert_array_equal(tensors.read(tmp_path / "model.pt")["x"], x)
    assert not [w for w in recwarn if "not writable" in str(w.message)]
