# SPDX-License-Identifier: Apache-2.0
"""Weights on the command line: in, out, and in again."""

import json

import numpy as np
import pytest

import hubert_jax
from hubert_jax import checkpoints, cli
from hubert_jax.data import cards
from hubert_jax.interchange import formats
from hubert_jax.stages import export, import_
from tests import tiny
from tests.interchange import made

WAVE_S = np.random.default_rng(0).normal(size=8_000).astype(np.float32) * 0.1


def import_weights(format_: str, path, out, *words: str) -> None:
    import_.main([f"--from={format_}", f"--path={path}", f"--out={out}", *words])


def export_weights(format_: str, checkpoint, out, *words: str) -> None:
    export.main(
        ["weights", f"--checkpoint={checkpoint}", f"--format={format_}", f"--out={out}", *words]
    )


def features(checkpoint) -> np.ndarray:
    return hubert_jax.load(checkpoint).features(WAVE_S, layer=2)


def test_an_imported_checkpoint_whose_card_was_edited_is_refused(tmp_path):
    """No array shows how many heads there are."""
    formats.write(made.model("base", "one set"), tmp_path / "theirs", format_="hf")
    import_weights("hf", tmp_path / "theirs", tmp_path / "first")
    path = tmp_path / "first" / "0" / "card" / "metadata"
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"model": card["model"] | {"num_heads": 2}}))
    with pytest.raises(ValueError, match=r"model\.num_heads is 2, it was trained with 4"):
        checkpoints.load_weights(tmp_path / "first")


@pytest.mark.parametrize("format_", ["hf", "torchaudio", "safetensors"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_go_in_out_and_in_again(kind, format_, tmp_path, capsys):
    model = made.model(kind, "one set", compute_dtype="auto", unroll="auto")
    formats.write(model, tmp_path / "theirs", format_="hf")
    import_weights("hf", tmp_path / "theirs", tmp_path / "first")
    assert "parameters, 3 layers of width 32, 12 codes" in capsys.readouterr().out
    loaded, card = checkpoints.load_weights(tmp_path / "first")
    made.assert_same(model, loaded)
    assert card["kind"] == "checkpoint" and card["step"] == 0
    assert card["model"]["normalize_audio"] == (kind == "large")
    assert card["made_from"]["imported"]["format"] == "hf"

    export_weights(format_, tmp_path / "first", tmp_path / "ours")
    import_weights(format_, tmp_path / "ours", tmp_path / "second")
    made.assert_same(model, checkpoints.load_weights(tmp_path / "second")[0])
    if format_ == "hf":
        features_TD = features(tmp_path / "first")
        assert features_TD.shape == (24, 32) and features_TD.std() > 0.1
        np.testing.assert_array_equal(features_TD, features(tmp_path / "second"))


def test_what_was_imported_before_stays(tmp_path, capsys):
    model = made.model("base", "one set")
    formats.write(model, tmp_path / "theirs", format_="hf")
    import_weights("hf", tmp_path / "theirs", tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    import_weights("hf", tmp_path / "theirs", tmp_path / "out")
    assert f"{tmp_path / 'out'}: imported before" in capsys.readouterr().out

    path = tmp_path / "theirs" / "preprocessor_config.json"
    path.write_text(json.dumps({"do_normalize": True}))  # the same tensors, another model
    with pytest.raises(ValueError, match=r"model\.normalize_audio is False.* another --out$"):
        import_weights("hf", tmp_path / "theirs", tmp_path / "out")
    formats.write(made.model("base", "one set", seed=1), tmp_path / "others", format_="hf")
    with pytest.raises(ValueError, match=r"made_from\.imported\.weights .*choose another --out$"):
        import_weights("hf", tmp_path / "others", tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_what_was_exported_before_stays(tmp_path, capsys):
    formats.write(made.model("base", "one set"), tmp_path / "theirs", format_="hf")
    import_weights("hf", tmp_path / "theirs", tmp_path / "in")
    export_weights("torchaudio", tmp_path / "in", tmp_path / "out")
    capsys.readouterr()
    export_weights("torchaudio", tmp_path / "in", tmp_path / "out")
    assert "done before" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"made_from\.suffix is '\.safetensors', this run has '\.pt'"
    ):
        export_weights("torchaudio", tmp_path / "in", tmp_path / "out", "--suffix=.pt")
    with pytest.raises(ValueError, match=r"is 'torchaudio', this run has 'hf'.* another --out$"):
        export_weights("hf", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("format_", "name"),
    [("hf", "config.json"), ("hf", "model.safetensors"), ("torchaudio", "torchaudio.json"),
     ("safetensors", "model.safetensors"), ("fairseq", "dict.km.txt")],
)  # fmt: skip
def test_exports_overwrite_nothing(format_, name, tmp_path):
    formats.write(made.model("base", "one set"), tmp_path / "theirs", format_="hf")
    import_weights("hf", tmp_path / "theirs", tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("theirs")
    with pytest.raises(
        ValueError, match=rf"out/{name} is there already, .* choose another --out, or remove it"
    ):
        export_weights(format_, tmp_path / "in", tmp_path / "out")
    assert [p.read_text() for p in (tmp_path / "out").iterdir()] == ["theirs"]


@pytest.mark.parametrize("outputs", ["one set", "ctc"])
@pytest.mark.parametrize("format_", formats.NAMES)
def test_the_files_of_a_format_are_known(format_, outputs, tmp_path):
    if format_ == "fairseq":
        pytest.importorskip("torch")
    formats.write(made.model("base", outputs), tmp_path, format_=format_)
    known = {path for pattern in formats.FILES[format_] for path in tmp_path.glob(pattern)}
    assert known == set(tmp_path.iterdir())


def test_heads_are_given_where_a_file_does_not_say(tmp_path):
    model = made.model("base", "one set")
    formats.write(model, tmp_path, format_="torchaudio")
    words = ("torchaudio", tmp_path / "model.safetensors", tmp_path / "out")
    (tmp_path / "torchaudio.json").unlink()
    with pytest.raises(ValueError, match="give --num_heads"):
        import_weights(*words)
    assert not (tmp_path / "out").exists()
    import_weights(*words, "--num_heads=4")
    loaded, _ = checkpoints.load_weights(tmp_path / "out")
    assert loaded.config.num_heads == 4
    np.testing.assert_array_equal(loaded.arrays["head.codes_CE"], model.arrays["head.codes_CE"])


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    for argv, code, message in (
        (["import", "--from=onnx", "--path=x", "--out=y"], 2, "invalid choice: 'onnx'"),
        (["import", "--from=hf", "--path=x", "--out=y", "--num_head=4"], 2, "--num_head=4"),
        (["import", "--from=hf", "--path=x"], 2, "--out"),
        (["import", "--from=torchaudio", "--path=x", "--out=y", "--num_heads=many"], 2, "many"),
        (["import", "--from=hf", "--path=x", "--out=y", "--num_heads=4"], 2,
         "--num_heads is said by the files of --from=hf"),
        (["export", "weights", "--checkpoint=x", "--format=hf", "--out=y", "--suffix=.pt"], 2,
         "--suffix is for --format=torchaudio, this is hf"),
        (["export", "weights", "--checkpoint=x", "--format=onnx", "--out=y"], 2, "'onnx'"),
        (["export", "weights", "--checkpoint=x", "--suffix=.bin", "--out=y"], 2, "'.bin'"),
        (["import", "--from=hf", f"--path={tmp_path}", "--out=y"], 1, "config.json: missing; is"),
        (["import", "--from=fairseq", f"--path={tmp_path}/a.pt", "--out=y"], 1, "no such file"),
        (["export", "weights", f"--checkpoint={tmp_path}", "--out=y"], 1, "no checkpoint here"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            cli.main(argv)
        err = capsys.readouterr().err
        assert exit_.value.code == code and message in err and "Traceback" not in err


def test_an_export_that_was_cut_off_goes_on(tmp_path):
    formats.write(made.model("base", "one set"), tmp_path / "theirs", format_="hf")
    import_weights("hf", tmp_path / "theirs", tmp_path / "in")
    export_weights("hf", tmp_path / "in", tmp_path / "out")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    card = cards.read(tmp_path / "out" / "card.json")
    cards.write(tmp_path / "out" / "card.json", card | {"is_finished": False})
    (tmp_path / "out" / "config.json").unlink()
    export_weights("hf", tmp_path / "in", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


def test_what_a_format_cannot_hold_leaves_no_mark(tmp_path):
    formats.write(made.model("base", "two sets"), tmp_path / "theirs", format_="hf")
    import_weights("hf", tmp_path / "theirs", tmp_path / "in")
    with pytest.raises(ValueError, match="torchaudio predicts one label set, this model 2"):
        export_weights("torchaudio", tmp_path / "in", tmp_path / "out")
    export_weights("hf", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
