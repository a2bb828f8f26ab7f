# SPDX-License-Identifier: Apache-2.0
"""What does not fit is refused, in words that name it; nothing is guessed."""

import dataclasses
import json
import re
import sys
import types

import numpy as np
import pytest
import safetensors.numpy

from hubert_jax.data import cards
from hubert_jax.interchange import fairseq, formats, tensors
from tests.interchange import made


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of every format without torch, none of which a test may change."""
    folder = tmp_path_factory.mktemp("exported")
    formats.write(made.model("base", "one set"), folder / "hf", format_="hf")
    formats.write(made.model("base", "ctc"), folder / "ctc", format_="hf")
    formats.write(made.model("base", "one set"), folder / "torchaudio", format_="torchaudio")
    formats.write(made.model("base", "one set"), folder / "safetensors", format_="safetensors")
    card = cards.new("weights", made_from={"format": "safetensors"},
                     **made.model("base", "one set").facts())  # fmt: skip
    cards.write(folder / "safetensors" / "card.json", card)
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of one of them in which tensors and keys can be changed."""

    class Copy:
        def __init__(self, name: str, *, format_: str | None = None):
            self.folder = tmp_path / name
            self.format = format_ or name
            for path in (exported / name).iterdir():
                self.folder.mkdir(exist_ok=True)
                (self.folder / path.name).write_bytes(path.read_bytes())

        def change_tensors(self, change, file="model.safetensors"):
            state = safetensors.numpy.load_file(exported / self.folder.name / file)
            change(state)
            safetensors.numpy.save_file(state, self.folder / file)

        def change_json(self, file, **changes):
            contents = json.loads((exported / self.folder.name / file).read_text())
            contents |= changes
            contents = {key: value for key, value in contents.items() if value is not ...}
            (self.folder / file).write_text(json.dumps(contents))

        def refused(self, message, error=ValueError):
            with pytest.raises(error, match=message) as raised:
                formats.read(self.folder, format_=self.format)
            assert str(self.folder) in str(raised.value)

    return Copy


# Tensors.


def rename(old, new):
    return lambda state: state.update({new: state.pop(old)})


@pytest.mark.parametrize("name", ["hf", "torchaudio"])
def test_missing_unused_and_misshaped_tensors_are_all_listed(name, copy):
    theirs = copy(name)
    prefix = "wav2vec2.encoder.transformer." if name == "torchaudio" else "encoder."
    query, norm = f"{prefix}layers.1.attention.q_proj.weight", f"{prefix}layer_norm.bias"

    def spoil(state):
        rename(query, "classifier.weight")(state)
        state["projector.bias"] = np.zeros(3, np.float32)
        state[norm] = state[norm][:-1]

    theirs.change_tensors(spoil)
    theirs.refused(
        "does not hold the model that it describes; "
        + re.escape(f"missing: {query}; unused: classifier.weight, projector.bias; ")
        + re.escape(f"of another shape: {norm} (31,) instead of (32,)")
    )


def test_long_lists_are_shortened(copy):
    theirs = copy("hf")
    theirs.change_tensors(
        lambda state: state.update({f"extra.{i}": np.zeros(1, np.float32) for i in range(11)})
    )
    theirs.refused(r"unused: extra\.0, extra\.1, .* and 3 more$")


def test_transposed_matrices_are_noticed(copy):
    theirs, name = copy("hf"), "encoder.layers.0.feed_forward.intermediate_dense.weight"
    theirs.change_tensors(lambda state: state.update({name: np.ascontiguousarray(state[name].T)}))
    theirs.refused(r"the config beside the tensors|of another shape: .*\(32, 64\) instead of")


def test_quantised_weights_are_no_floats(copy):
    theirs, name = copy("hf"), "encoder.layers.0.feed_forward.output_dense.weight"
    theirs.change_tensors(lambda state: state.update({name: np.ones((32, 64), np.int8)}))
    theirs.refused(re.escape(f"no floats: {name} int8"))


def test_a_head_file_belongs_to_its_section(copy):
    theirs = copy("hf")
    config = json.loads((theirs.folder / "config.json").read_text())
    theirs.change_tensors(
        lambda state: state.update(label_embs_concat=state["label_embs_concat"][:-1]),
        file="pretraining_head.safetensors",
    )
    theirs.refused(r"of another shape: label_embs_concat \(11, 8\) instead of \(12, 8\)")
    del config["hubert_jax"]
    (theirs.folder / "config.json").write_text(json.dumps(config))
    theirs.refused(r"config\.json has no section hubert_jax\.head .*: remove that file to import")


@pytest.mark.parametrize("name", ["hf", "torchaudio", "safetensors"])
def test_files_that_are_not_whole(name, copy):
    theirs = copy(name)
    path = theirs.folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:7], b"", b"x" * 1000):
        path.write_bytes(damaged)
        theirs.refused(r"model\.safetensors: not a safetensors file that is whole")
    path.unlink()
    theirs.refused("model.safetensors", error=FileNotFoundError)


# Indices.


def test_shards_lie_beside_their_index(copy, exported):
    theirs = copy("hf")
    (theirs.folder / "model.safetensors").unlink()
    index = theirs.folder / "model.safetensors.index.json"
    outside = str(exported / "hf" / "model.safetensors")
    for file in (outside, "../hf/model.safetensors", "sub/model.safetensors", 1):
        index.write_text(json.dumps({"weight_map": {"masked_spec_embed": file}}))
        theirs.refused(re.escape(f"shard {file!r} is not a file beside it"))
    for file in (index.name, "pytorch_model.bin.index.json"):
        index.write_text(json.dumps({"weight_map": {"masked_spec_embed": file}}))
        theirs.refused(re.escape(f"shard {file!r} is an index, not a file of tensors"))
    for contents in ("{", "[]", "{}", '{"weight_map": ["x"]}'):
        index.write_text(contents)
        theirs.refused(r"index\.json: not an index of shards")
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    theirs.refused(r"gone\.safetensors: no such file", error=FileNotFoundError)
    index.write_text(json.dumps({"weight_map": {"x": "vocab.txt"}}))
    (theirs.folder / "vocab.txt").write_text("x")
    theirs.refused(r"vocab\.txt: weights come as \.safetensors or \.pt")


# Configs.


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "wav2vec2", r"model_type is 'wav2vec2'; this model knows 'hubert' only"),
        ("hidden_act", "relu", r"hidden_act is 'relu'; this model knows 'gelu' only"),
        ("feat_extract_activation", "gelu_new", r"feat_extract_activation is 'gelu_new'"),
        ("conv_kernel", [10, 3, 3, 3, 3, 2, 3], r"conv_kernel is \[10, 3, 3, 3, 3, 2, 3\]"),
        ("conv_stride", [5, 2, 2, 2, 2, 2], r"conv_stride is \[5, 2, 2, 2, 2, 2\]; this model"),
        ("num_feat_extract_layers", 6, r"num_feat_extract_layers is 6; this model knows 7 only"),
        ("feat_proj_layer_norm", False, r"feat_proj_layer_norm is False"),
        ("conv_pos_batch_norm", True, r"conv_pos_batch_norm is True"),
        ("layer_norm_eps", 1e-12, r"layer_norm_eps is 1e-12"),
        ("conv_dim", [16] * 6 + [24], r"conv_dim is \[16, .*24\]; seven equal conv_dim are"),
        ("conv_dim", ..., r"lacks conv_dim; seven equal"),
        ("hidden_size", ..., r"lacks hidden_size"),
        ("num_attention_heads", 5, r"model\.width 32 must be a multiple of num_heads 5"),
        ("feat_extract_norm", "batch", r"model\.conv_norm is 'batch'"),
        ("intermediate_size", 65, r"of another shape: .*\(64, 32\) instead of \(65, 32\)"),
        ("num_hidden_layers", 2, r"unused: encoder\.layers\.2\."),
        ("num_hidden_layers", 4, r"missing: encoder\.layers\.3\."),
        ("conv_bias", True, r"missing: feature_extractor\.conv_layers\.0\.conv\.bias"),
        ("do_stable_layer_norm", ..., r"lacks do_stable_layer_norm"),
    ],
)  # fmt: skip
def test_configs_of_other_models(key, value, message, copy):
    theirs = copy("hf")
    theirs.change_json("config.json", **{key: value})
    with pytest.raises(ValueError, match=message):
        formats.read(theirs.folder, format_="hf")


def test_a_folder_that_is_none_of_save_pretrained(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing; is this a folder of save"):
        formats.read(tmp_path, format_="hf")
    theirs = copy("hf")
    for contents, message in (("{", "not JSON"), ("[1]", "an object is wanted, not list")):
        (theirs.folder / "config.json").write_text(contents)
        theirs.refused(message)
    theirs = copy("hf")
    (theirs.folder / "model.safetensors").unlink()
    theirs.refused(r"has none of model\.safetensors, model\.saf", FileNotFoundError)


def test_the_blank_is_one_of_the_symbols(copy):
    theirs = copy("ctc", format_="hf")
    for blank in (None, 7, -1):
        theirs.change_json("config.json", pad_token_id=blank)
        theirs.refused(rf"pad_token_id, the blank, is {blank}; there are 7 symbols")
    theirs.change_json("config.json", pad_token_id=...)  # transformers' default
    assert formats.read(theirs.folder, format_="hf").ctc.blank == 0


def test_symbols_without_a_vocabulary_are_numbers(copy, capsys):
    theirs = copy("ctc", format_="hf")
    (theirs.folder / "vocab.json").unlink()
    assert formats.read(theirs.folder, format_="hf").ctc.symbols == tuple(f"#{i}" for i in range(7))
    assert "no vocab.json; the 7 symbols are called by their numbers" in capsys.readouterr().out


def test_vocabularies_that_number_no_symbols(copy):
    theirs = copy("ctc", format_="hf")
    for symbols, wrong in (
        ({"eng": {"E": 5}}, "'eng' is {'E': 5}"),
        ({"E": "5"}, "'E' is '5'"),
        ({"E": 5, "T": None}, "'T' is None"),
    ):
        (theirs.folder / "vocab.json").write_text(json.dumps(symbols))
        theirs.refused(rf"vocab\.json: {re.escape(wrong)}; symbols and their whole numbers")


def test_arguments_and_tensors_of_torchaudio_that_differ(copy):
    theirs = copy("torchaudio")
    arguments = json.loads((theirs.folder / "torchaudio.json").read_text())["arguments"]
    for key, value, message in (
        ("encoder_embed_dim", 64, "the config beside the tensors says width 64, they say 32"),
        ("encoder_num_layers", 12, "says num_layers 12, they say 3"),
        ("extractor_conv_bias", True, "says conv_bias True, they say False"),
    ):
        theirs.change_json("torchaudio.json", arguments=arguments | {key: value})
        theirs.refused(message)
    for contents in ("{", "[]", "{}"):
        (theirs.folder / "torchaudio.json").write_text(contents)
        theirs.refused(r"torchaudio\.json: does not say how the model is made")


def test_no_model_of_torchaudio(copy):
    theirs = copy("torchaudio")
    theirs.change_tensors(lambda state: rename("logit_generator.label_embeddings", "x")(state))
    theirs.refused(r"no HuBERT of torchaudio: has no logit_generator\.label_embeddings")
    theirs.change_tensors(lambda state: (state.clear(), state.update(x=np.zeros(1))))
    theirs.refused(r"no HuBERT of torchaudio: has no encoder\.transformer\.pos_conv_embed")
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor model\.pt"):
        formats.read(theirs.folder.parent, format_="torchaudio")


def test_heads_are_said_once(copy):
    with pytest.raises(ValueError, match=r"--num_heads is 8, its config says 4"):
        formats.read(copy("torchaudio").folder, format_="torchaudio", num_heads=8)


# Our own.


def test_cards_of_something_else(copy):
    theirs = copy("safetensors")
    theirs.change_json("card.json", kind="checkpoint")
    theirs.refused(r"kind is 'checkpoint', expected 'weights'")
    theirs.change_json("card.json", made_from={"format": "hf"})
    theirs.refused(r"made_from\.format is 'hf', expected 'safetensors'")
    theirs.change_json("card.json", num_codes=[13])
    theirs.refused(
        r"1 arrays do not fit its card; the first is head\.codes_CE, \(12, 8\) instead of \(13, 8\)"
    )
    theirs.change_json("card.json", head=None, num_codes=[])
    theirs.refused(r"3 arrays do not fit .*head\.bias, \(1, 8\) instead of none")
    (theirs.folder / "card.json").unlink()
    theirs.refused("no card", error=FileNotFoundError)


def test_the_weights_may_be_named_instead_of_their_folder(exported):
    for name in ("hf", "safetensors", "torchaudio"):
        made.assert_same(
            formats.read(exported / name / "model.safetensors", format_=name),
            formats.read(exported / name, format_=name),
        )


# What a format cannot hold.


@pytest.mark.parametrize(
    ("format_", "outputs", "message"),
    [
        ("torchaudio", "two sets", "torchaudio predicts one label set, this model 2"),
        ("torchaudio", "two sets, untied", "torchaudio predicts one label set, this model 2"),
        ("torchaudio", "both", "torchaudio holds a code prediction or a CTC output: .* has both"),
        ("fairseq", "both", "fairseq.s models have .*, this one has both"),
        ("fairseq", "bare", "fairseq.s models have .*, this one has neither: export it as hf"),
    ],
)
def test_models_that_a_format_cannot_hold(format_, outputs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        formats.write(made.model("base", outputs), tmp_path, format_=format_)
    assert not list(tmp_path.iterdir())


def test_other_temperatures_than_torchaudios(tmp_path):
    model = made.model()
    warmer = model._replace(head=dataclasses.replace(model.head, temperature=0.2))
    with pytest.raises(ValueError, match=r"torchaudio's temperature is 0\.1, this head's 0\.2"):
        formats.write(warmer, tmp_path, format_="torchaudio")


# Without torch.


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def test_without_torch_pt_files_say_what_is_missing(no_torch, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"whatever")
    message = (
        re.escape(f"{path}: .pt files are read and written with torch, which is not installed:")
        + " pip install torch .*, or use safetensors"
    )
    for format_ in ("fairseq", "torchaudio"):
        with pytest.raises(ImportError, match=message):
            formats.read(path, format_=format_)
        with pytest.raises(ImportError, match=message):
            formats.read(tmp_path, format_=format_)
    path.unlink()
    for format_ in ("fairseq", "torchaudio"):
        with pytest.raises(ImportError, match=message):
            formats.write(made.model(), tmp_path, format_=format_, suffix=".pt")
        assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    with pytest.raises(ImportError, match=r"pytorch_model\.bin: \.pt files are read and written"):
        formats.read(tmp_path, format_="hf")


def test_a_torch_that_is_too_old_is_named(monkeypatch, tmp_path):
    old = types.SimpleNamespace(__version__="2.5.1", serialization=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch", old)
    (tmp_path / "model.pt").write_bytes(b"whatever")
    with pytest.raises(ImportError, match=r"model\.pt: .* torch 2\.6 or newer, 2\.5\.1 is inst"):
        formats.read(tmp_path, format_="fairseq")


def test_all_else_needs_no_torch(no_torch, exported):
    for name in ("hf", "torchaudio", "safetensors"):
        formats.read(exported / name, format_=name)


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "gone.pt", tmp_path / "gone.safetensors"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            fairseq.read(path) if path.suffix == ".pt" else tensors.read(path)
