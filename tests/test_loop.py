# SPDX-License-Identifier: Apache-2.0
"""The whole loop, from a folder of tones to the units of a second model, by the commands' own code.

The tones are eight "phones" in known order, written down in .phn files, so the labels have scores.
"""

import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
import soundfile
from etils import epath

import hubert_jax
from hubert_jax import checkpoints, config_files, logs, train, weights
from hubert_jax.data import arrays, cards
from hubert_jax.stages import export, features, prepare, pretrain, run
from tests import signals

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"
SAMPLE_RATE = 16_000
SIZES = [
    "corpus.num_workers=0", "corpus.num_shards=1", "corpus.validation_share=0.34",
    "kmeans.num_codes=8", "kmeans.seed_rows=400", "kmeans.num_restarts=1", "kmeans.batch_rows=200",
    "features.batch_seconds=8.0", "features.num_shards=2",
    "model.conv_width=8", "model.width=16", "model.ffn_width=32", "model.num_layers=2",
    "model.position_kernel=16", "model.position_groups=2", "head.code_width=8",
    "batch.seconds=16.0", "batch.rungs=(1.0,)", "batch.min_seconds=1.0", "batch.row_multiple=8",
    "optim.warmup_steps=2", "train.report_every=2", "train.validate_every=3",
    "checkpoints.every=3",
]  # fmt: skip


def write_tones(folder: pathlib.Path) -> None:
    """Six files of three speakers: half-second tones of eight pitches, with phone times."""
    for n in range(6):
        rng = np.random.default_rng(n)
        pitches = rng.integers(0, 8, 5)
        time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
        tones = [np.sin(2 * np.pi * 200 * 1.4**p * time) for p in pitches]
        audio_S = 0.2 * np.concatenate(tones) + 0.01 * rng.normal(size=5 * len(time))
        path = folder / f"speaker{n % 3}" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio_S, SAMPLE_RATE)
        lines = [f"{i * 8000} {(i + 1) * 8000} tone{p}\n" for i, p in enumerate(pitches)]
        path.with_suffix(".phn").write_text("".join(lines))


def get_config(tones: pathlib.Path, num_steps: int = 6, **changes):
    def build(iteration: str):
        overrides = [f"corpus.train={tones}", *SIZES]
        overrides += [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
        path = f"{DEMO}:{iteration}" if iteration else str(DEMO)
        config = config_files.load(path, [f"--config.{override}" for override in overrides])
        if config.train.num_steps:
            config.train.num_steps = num_steps
        return config

    return build


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(tones, work directory) of a loop that has run to its end."""
    folder = tmp_path_factory.mktemp("loop")
    write_tones(folder / "tones")
    run.run(get_config(folder / "tones"), epath.Path(folder / "work"))
    return folder / "tones", epath.Path(folder / "work")


def digests(workdir: epath.Path) -> dict[str, str]:
    paths = [p for p in pathlib.Path(workdir).rglob("*") if p.suffix in (".npy", ".npz", ".json")]
    return {str(p): cards.digest(p) for p in sorted(paths)}


def test_every_artefact_is_there_with_its_card(finished):
    _, workdir = finished
    for iteration, rate in (("it1", 100), ("it2", 50), ("units", 50)):
        for split in ("train", "validation"):
            store = arrays.Store(workdir / iteration / "labels" / split)
            assert store.card["rate"] == rate and store.dtype == np.int16
            assert store.card["scores"]["pnmi"] > 0
        assert cards.read(workdir / iteration / "codebook.json")["num_codes"] == 8
    for iteration in ("it1", "it2"):
        assert checkpoints.resolve(workdir / iteration / "checkpoints").name == "6"
        metrics = logs.read_metrics(workdir / iteration / "logs" / "metrics.jsonl")
        steps = [line["step"] for line in metrics if "train/masked_loss" in line]
        assert steps == [1, 3, 6]  # one step late, and the last
        assert [line["step"] for line in metrics if "validation/masked_loss" in line] == [3, 6]
        assert all(np.isfinite(list(line.values())).all() for line in metrics)
    assert not (workdir / "units" / "checkpoints").exists()


def test_run_again_changes_nothing(finished, capsys):
    tones, workdir = finished
    before = digests(workdir)
    run.run(get_config(tones), workdir)
    assert digests(workdir) == before
    output = capsys.readouterr().out
    assert output.count("done before") >= 8
    for row in ("MFCC", "it1", "it2"):
        assert any(line.startswith(row) for line in output.splitlines())


def test_exported_units_are_the_labels_of_the_loop(finished, tmp_path):
    tones, workdir = finished
    checkpoint, codebook = workdir / "it2" / "checkpoints", workdir / "units" / "codebook.npz"
    export.main(
        ["units", f"--checkpoint={checkpoint}", f"--codebook={codebook}", f"--audio={tones}",
         f"--out={tmp_path}"]
    )  # fmt: skip
    for split in ("train", "validation"):
        labels = arrays.Store(workdir / "units" / "labels" / split)
        for id_ in labels.ids:
            np.testing.assert_array_equal(np.load(tmp_path / f"{id_}.npy"), labels[id_])


def test_the_python_call_gives_the_same_features_as_the_stage(finished):
    tones, workdir = finished
    layer = cards.read(workdir / "units" / "features" / "card.json")["source"]["layer"]
    model = hubert_jax.load(workdir / "it2" / "checkpoints")
    stored = arrays.Store(workdir / "units" / "features")
    id_ = stored.ids[0]
    wave_S, _ = soundfile.read(tones / f"{id_}.wav", dtype="float32")
    np.testing.assert_allclose(model.features(wave_S, layer=layer), stored[id_], atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__peak_lr": 1.0}, r"made_from.optim.peak_lr is 0\.\d+, this run has 1.0"),
        ({"kmeans__num_codes": 9}, r"num_codes is 8, .* 9"),
        ({"corpus__min_seconds": 0.3}, r"min_seconds"),
    ],
)
def test_another_config_in_the_same_place_is_refused(finished, changes, message):
    tones, workdir = finished
    before = digests(workdir)
    with pytest.raises(ValueError, match=message):
        run.run(get_config(tones, **changes), workdir)
    assert digests(workdir) == before


@pytest.mark.parametrize(
    ("moment", "message", "validate_every"),
    [
        ({"call": 3}, "after step 3; it is saved", 100),
        ({"compilation": 1}, "before its first step", 3),
        ({"compilation": 2}, "after step 3; it is saved", 3),  # in its validation
        ({"compilation": 2}, "after step 6; it is saved", 100),  # in that of the last step
    ],
)
def test_pretraining_that_was_stopped_ends_with_the_same_weights(
    finished, tmp_path, monkeypatch, moment, message, validate_every
):
    tones, workdir = finished
    again = epath.Path(tmp_path / "work")
    shutil.copytree(workdir, again, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    config = get_config(tones)("it1")
    config.checkpoints.every, config.train.validate_every = 100, validate_every
    with monkeypatch.context() as patched, pytest.raises(train.Interrupted, match=message):
        signals.come(patched, **moment)
        pretrain.run(config, again)
    if "after step 3" in message:
        with pytest.raises(ValueError, match="trained for 3 of 6 steps"):
            features.run(get_config(tones)("it2"), again)
    pretrain.run(config, again)
    ended, straight = (
        weights.to_named(checkpoints.load_model(folder / "it1" / "checkpoints")[0])
        for folder in (again, workdir)
    )
    for name, array in straight.items():
        np.testing.assert_array_equal(ended[name], array, err_msg=name)
    # No validation is left out, none is repeated.
    steps = [3, 6] if validate_every == 3 else [6]
    assert validations(again) == [x for x in validations(workdir) if x["step"] in steps]
    before = validations(again)
    pretrain.run(config, again)
    assert validations(again) == before


def test_a_signal_while_the_last_checkpoint_is_written_does_not_cost_it(
    finished, tmp_path, monkeypatch
):
    tones, workdir = finished
    again = epath.Path(tmp_path / "work")
    shutil.copytree(workdir, again, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    wait = checkpoints.Checkpoints.wait

    def signalled(saved):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(saved)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Checkpoints, "wait", signalled)
        with pytest.raises(train.Interrupted, match="after step 6; it is saved"):
            pretrain.run(get_config(tones)("it1"), again)
    assert checkpoints.resolve(again / "it1" / "checkpoints").name == "6"


def validations(workdir: epath.Path) -> list[dict[str, float]]:
    """Of it1, as they were logged."""
    lines = logs.read_metrics(workdir / "it1" / "logs" / "metrics.jsonl")
    return [line for line in lines if "validation/masked_loss" in line]


def test_labels_of_a_codebook_that_is_gone_are_refused(finished, tmp_path):
    tones, workdir = finished
    again = epath.Path(tmp_path / "work")
    shutil.copytree(workdir, again, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    shutil.copy(workdir / "it2" / "codebook.npz", again / "it1" / "codebook.npz")
    with pytest.raises(ValueError, match="codebook is 'sha256"):
        pretrain.run(get_config(tones)("it1"), again)


def test_labels_of_another_corpus_are_refused(finished, tmp_path):
    _, workdir = finished
    write_tones(tmp_path / "tones")
    (tmp_path / "tones" / "speaker0" / "0.wav").unlink()
    config = get_config(tmp_path / "tones")("it1")
    prepare.run(config, epath.Path(tmp_path / "work"))
    config.train.labels = (f"{workdir}/it1/labels",)
    with pytest.raises(ValueError, match="corpus is 'sha256"):
        pretrain.run(config, epath.Path(tmp_path / "work"))


def test_more_codes_than_frames_are_refused(finished, tmp_path):
    tones, _ = finished
    with pytest.raises(ValueError, match="99999"):
        run.run(get_config(tones, kmeans__num_codes=99_999), epath.Path(tmp_path / "work"))


def test_a_batch_too_small_for_the_devices_is_refused(finished, tmp_path):
    tones, _ = finished
    with pytest.raises(ValueError, match="row"):
        run.run(get_config(tones, batch__seconds=2.0), epath.Path(tmp_path / "work"))
