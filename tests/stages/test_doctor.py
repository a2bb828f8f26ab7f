# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what was planted, one fault at a time, and nothing where nothing was."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from etils import epath

from hubert_jax import config_files
from hubert_jax.doctor import curves, disk, labels, plan
from hubert_jax.stages import doctor, prepare
from tests.stages.doctor_project import (
    DEMO,
    NUM_CODES,
    SAMPLE_RATE,
    by_what,
    get_config,
    not_ok,
    speech,
    write_audio,
    write_labels,
    write_metrics,
)


def test_nothing_is_found_where_nothing_is_wrong(clean):
    root, workdir = clean
    found = doctor.examine([get_config(root)], workdir)
    assert not [finding for finding in found if finding.level != "ok"]
    assert len(found) > 30


def again(tmp_path, **audio) -> tuple[pathlib.Path, epath.Path]:
    """Other audio, prepared and labelled."""
    write_audio(tmp_path / "audio", **audio)
    workdir = epath.Path(tmp_path / "work")
    prepare.run(get_config(tmp_path / "audio"), workdir)
    return tmp_path / "audio", workdir


def telephone(tmp_path):
    return again(tmp_path, change=lambda n, wave: wave[::2], rate=8_000)


def clipped(tmp_path):
    return again(
        tmp_path, change=lambda n, wave: (20 * wave).clip(-1, 1) if n < 24 and n % 3 else wave
    )


def mostly_silent(tmp_path):
    def silence(n, wave):
        return (
            np.where(np.arange(len(wave)) < 0.2 * len(wave), wave, 0) if n < 24 and n % 3 else wave
        )

    return again(tmp_path, change=silence)


def copies_in_train(tmp_path):
    return again(tmp_path, change=lambda n, wave: speech(1) if n in (7, 8) else wave)


def train_in_validation(tmp_path):
    return again(tmp_path, change=lambda n, wave: speech(1) if n == 25 else wave)


def same_speakers(tmp_path):
    write_audio(tmp_path / "audio")
    folder = tmp_path / "audio" / "validation"
    (folder / "speaker6").rename(folder / "speaker1")
    for path in (folder / "speaker1").iterdir():
        path.rename(path.with_name(f"new-{path.name}"))
    workdir = epath.Path(tmp_path / "work")
    prepare.run(get_config(tmp_path / "audio"), workdir)
    return tmp_path / "audio", workdir


def one_voice(tmp_path):
    return again(
        tmp_path, change=lambda n, w: speech(n, seconds=25) if n < 24 and n % 6 == 2 else w
    )


AUDIO_FAULTS = {
    telephone: ("look", "audio: rates"),
    clipped: ("look", "audio train: clipping"),
    mostly_silent: ("look", "audio train: silence"),
    copies_in_train: ("look", "audio train: duplicates"),
    train_in_validation: ("stop", "audio validation: new recordings"),
    same_speakers: ("look", "audio validation: new speakers"),
    one_voice: ("look", "audio train: speakers"),
}


@pytest.mark.parametrize("fault", AUDIO_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_audio_is_found(fault, tmp_path):
    level, what = AUDIO_FAULTS[fault]
    root, workdir = fault(tmp_path)
    found = not_ok(get_config(root), workdir)
    assert found[what].level == level and found[what].remedy
    assert set(found) == {what}


def flip(path: pathlib.Path, place: float = 0.7) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def relabelled(**changes):
    def fault(workdir):
        shutil.rmtree(workdir / "it1")
        write_labels(workdir, **changes)

    return fault


def shorter_labels(workdir):
    """The labels of one utterance go to its neighbour."""
    path = pathlib.Path(workdir / "it1" / "labels" / "train" / "index.npz")
    with np.load(path) as found:
        index = dict(found)
    index["offsets"][5] += 3
    np.savez_compressed(path, **index)


def flipped_labels(workdir):
    flip(next(pathlib.Path(workdir / "it1" / "labels" / "train").glob("shard*")))


def flipped_codebook(workdir):
    flip(pathlib.Path(workdir / "it1" / "codebook.npz"))


def flipped_audio(workdir):
    flip(next(pathlib.Path(workdir / "corpus").glob("speech-train*")), place=0.5)


def one_frequent_code(codes):
    return np.where(np.arange(len(codes)) % 100 < 60, 7, codes).astype(np.int16)


def curve(**changes):
    def fault(workdir):
        write_metrics(workdir, change=lambda row: row | {k: f(row) for k, f in changes.items()})

    return fault


WORKDIR_FAULTS = {
    "labels of other lengths": (shorter_labels, "stop", "labels it1 train: files"),
    "labels of another corpus": (
        relabelled(corpus_id="sha256:x"), "stop", "labels it1 train: files"),
    "a flipped byte in labels": (flipped_labels, "stop", "labels it1 train: files"),
    "a flipped byte in the codebook": (flipped_codebook, "stop", "codebook it1"),
    "a flipped byte in the audio": (flipped_audio, "stop", "audio: files"),
    "labels that are no codes": (
        relabelled(change=lambda c: c + np.int16(1)), "stop", "labels it1 train: files"),
    "labels below zero": (
        relabelled(change=lambda c: c - np.int16(1)), "stop", "labels it1 train: files"),
    "half of the codes unused": (
        relabelled(change=lambda c: c // 2), "look", "labels it1 train: codes"),
    "one code for most": (
        relabelled(change=one_frequent_code), "look", "labels it1 train: one code"),
    "labels like noise": (
        relabelled(change=lambda c: np.random.default_rng(0).permutation(c)),
        "look", "labels it1 train: runs"),
    "a loss that rose": (
        curve(masked_loss=lambda row: 2.0 if row["step"] < 280 else 2.5),
        "look", "curve it1: rise"),
    "steps that were skipped": (
        curve(skipped=lambda row: float(row["step"] == 100) / 20), "look", "curve it1: skipped"),
    "a model of one code": (
        curve(predicted_perplexity=lambda row: 1.01), "look", "curve it1: one code"),
    "features that collapsed": (
        curve(feature_spread=lambda row: 0.001), "look", "curve it1: features"),
    "a leak": (curve(masked_accuracy=lambda row: 0.98), "look", "curve it1: accuracy"),
    "a model that copies": (
        curve(masked_accuracy=lambda row: 0.2), "look", "curve it1: copying"),
    "a loss that stays": (curve(masked_loss=lambda row: 2.99), "look", "curve it1: frequencies"),
    "a slow disk": (curve(seconds_waited_for_data=lambda row: 4.0), "look", "curve it1: waiting"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKDIR_FAULTS)
def test_a_fault_of_the_work_directory_is_found(clean, tmp_path, name):
    fault, level, what = WORKDIR_FAULTS[name]
    root, workdir = clean
    copy = epath.Path(tmp_path / "work")
    shutil.copytree(workdir, copy)
    fault(copy)
    found = not_ok(get_config(root), copy)
    assert found[what].level == level and found[what].remedy
    of_labels = [
        f"labels it1 {s}: {w}"
        for s in ("train", "validation")
        for w in ("files", "codes", "one code", "runs")
    ]
    same_cause = {"codebook it1", "curve it1: copying", *of_labels}
    assert set(found) <= {what} | (same_cause if "it1" in what else set())


@pytest.mark.parametrize(
    ("changes", "level", "what"),
    [
        (dict(optim__warmup_steps=300), "stop", "plan it1: warm-up"),
        (dict(optim__warmup_steps=200), "look", "plan it1: warm-up"),
        (dict(batch__row_multiple=4), "stop", "plan it1: rows"),
        (dict(train__num_steps=2, optim__warmup_steps=1, checkpoints__every=1), "look",
         "plan it1: epochs"),
        (dict(batch__min_seconds=2.9, batch__max_seconds=3.0), "stop", "plan it1: batches"),
        (dict(optim__peak_lr=0.1), "look", "plan it1: batch and rate"),
        (dict(checkpoints__every=300), "look", "plan it1: checkpoints"),
        (dict(mesh__fsdp=3), "stop", "devices it1"),
        (dict(batch__rungs=(0.5,), batch__min_seconds=0.5), "look", "plan it1: cropped"),
        (dict(model__width=768, model__num_heads=12, optim__peak_lr=5e-4), "look",
         "plan it1: batch and rate"),  # the paper's rate, and not its batch
    ],
)  # fmt: skip
def test_a_fault_of_the_plan_is_found(clean, changes, level, what):
    root, workdir = clean
    found = not_ok(get_config(root, **changes), workdir)
    assert found[what].level == level and found[what].remedy


@pytest.mark.parametrize(
    ("memory", "remat", "level"),
    [
        (10**10, "none", "ok"),
        (10**9, "none", "look"),
        (10**9, "layer", "ok"),
        (10**8, "layer", "stop"),
    ],
)
def test_a_device_that_is_too_small_is_found(memory, remat, level):
    """Half a gigabyte of weights, gradient and moments, and twice as much besides."""
    config = config_files.load(f"{DEMO}:it1", [f"--config.model.remat={remat}"])
    size = plan.Size(parameters=2**25, activations=10**9)
    found = plan.of_memory(config, size, plan.Machine(1, 1, "a GPU", memory))
    assert found.level == level and (found.remedy or level == "ok")


def test_a_disk_that_is_too_small_is_found(clean, monkeypatch):
    root, workdir = clean
    monkeypatch.setattr(doctor, "free_bytes", lambda workdir: 10_000_000)
    found = not_ok(get_config(root), workdir)
    assert found["disk"].level == "stop" and set(found) == {"disk"}
    assert "it1 checkpoints" in found["disk"].reason and "labels" not in found["disk"].reason


def test_what_a_disk_has_to_hold():
    assert disk.labels_bytes(SAMPLE_RATE, rate=50) == 100
    size = dict(rate=100, width=39, dtype="float16")
    assert disk.features_bytes(SAMPLE_RATE, share=0.5, **size) == 0.5 * 100 * 39 * 2
    kept = disk.checkpoints_bytes(10, num_steps=100, keep_last=2, keep_every=50)
    assert kept == 10 * 12 * (2 + 1 + 2)


IN_DEMO = labels.Guesses(copying=0.226, entropy=4.37)  # of it1's labels


def test_a_run_of_our_own_recipe_is_held_against_our_curve():
    config = config_files.load(f"{DEMO}:it1")
    (curve_of_it1,) = [c for c in curves.stored() if c["recipe"] == curves.recipe(config)]
    rows = [
        {"step": step, "train/masked_loss": loss, "train/masked_accuracy": accuracy,
         "train/predicted_perplexity": 20.0, "train/label_perplexity": 77.0,
         "train/audio_seconds": 8.0, "train/audio_seconds_per_second": 40.0}
        for step, loss, accuracy in curve_of_it1["points"]
    ]  # fmt: skip
    for until in range(1, len(rows)):
        found = curves.of_metrics(config, rows[:until], 100, IN_DEMO)
        assert {f.level for f in found} == {"ok"}, [f for f in found if f.level != "ok"]
    late = [row | {"train/masked_loss": 4.6} for row in rows]
    found = curves.of_metrics(config, late[:8], 100, IN_DEMO)
    looked_at = [f.what for f in found if f.level == "look"]
    assert looked_at == ["curve it1: frequencies", "curve it1: beside ours"]


@pytest.mark.parametrize(("num_steps", "level"), [(2_400, "look"), (100_000, "ok")])
def test_the_same_model_on_another_schedule_is_told_of_our_curve(num_steps, level):
    flags = [f"--config.train.num_steps={num_steps}", "--config.optim.warmup_steps=160"]
    config = config_files.load(f"{DEMO.parent / 'small.py'}:it1", flags)
    row = {
        "step": 600, "train/masked_loss": 4.4, "train/masked_accuracy": 0.05,
        "train/predicted_perplexity": 20.0, "train/label_perplexity": 77.0,
        "train/audio_seconds": 8.0, "train/audio_seconds_per_second": 40.0,
    }  # fmt: skip
    *_, found = curves.of_metrics(config, [row], 100, None)
    assert found.level == level and "masked loss 4.40 at step 600" in found.reason
    assert "had 3.37" in found.reason
    *_, late = curves.of_metrics(config, [row | {"step": 900}], 100, None)
    assert late.level == "ok" and "ours ends at step 799" in late.reason


def test_what_to_expect_is_ours_or_reported_and_more_than_copying():
    configs = DEMO.parent

    def said(name: str, guesses: labels.Guesses | None = None) -> str:
        return curves.expected(config_files.load(f"{configs / name}"), guesses).reason

    assert "ln K = 4.61 down to 2." in said("demo.py:it1") and "our run" in said("demo.py:it1")
    assert "2.31 and 0.365 at step 250000" in said("base.py:it1") and "ESPnet" in said(
        "base.py:it1"
    )
    assert "2.37 and 0.417 at step 400000 are reported (one" in said("base.py:it2")
    for name in ("small.py:it1", "large.py", "xlarge.py"):
        assert "no run of this recipe" in said(name) and "copying" not in said(name)
        assert "visible code gives an accuracy of 0.162" in said(name, labels.Guesses(0.162, 4.3))
    assert "base had an accuracy of 0.390" in said("small.py:it1")
    assert "another schedule had 3.21 and 0.217 at step 799 (the first 800" in said("small.py:it1")
    assert "base had an accuracy of 0.417" in said("large.py")


@pytest.mark.parametrize(
    ("step", "accuracy", "level"),
    [(10_000, 0.01, "ok"), (250_000, 0.17, "look"), (250_000, 0.3, "ok"), (300_000, 0.19, "ok")],
)
def test_base_is_held_against_what_fairseq_reports(step, accuracy, level):
    config = config_files.load(f"{DEMO.parent / 'base.py'}:it1")
    row = {
        "step": step, "train/masked_loss": 2.5, "train/masked_accuracy": accuracy,
        "train/predicted_perplexity": 20.0, "train/label_perplexity": 40.0,
        "train/audio_seconds": 8.0, "train/audio_seconds_per_second": 40.0,
    }  # fmt: skip
    found = {f.what: f for f in curves.of_metrics(config, [row], 100, None)}
    assert found["curve it1: beside others"].level == level
    assert "reported at step 250000 are 2.31 and 0.365" in found["curve it1: beside others"].reason


def test_copying_takes_the_nearest_visible_code():
    rng = np.random.default_rng(0)
    codes_NT = np.repeat(rng.integers(0, 5, (20, 15)), 4, axis=1)
    mask_NT = rng.random((20, 60)) < 0.6
    mask_NT[:, 7] = False
    mask_NT[0, :7] = mask_NT[1, 8:] = True  # nothing is visible on one side
    hits = []
    for codes_T, mask_T in zip(codes_NT, mask_NT, strict=True):
        visible = np.flatnonzero(~mask_T)
        for place in np.flatnonzero(mask_T):
            nearest = visible[np.argmin(np.abs(visible - place))]  # of two, the first
            hits.append(codes_T[nearest] == codes_T[place])
    assert labels.accuracy_of_copying(codes_NT, mask_NT) == pytest.approx(np.mean(hits))
    assert labels.accuracy_of_copying(np.ones_like(codes_NT), mask_NT) == 1.0


def test_guesses_of_the_labels_of_a_work_directory(clean, tmp_path):
    root, workdir = clean
    config = get_config(root)
    found = labels.guesses(workdir / "it1", config)
    assert found is not None and 0.2 < found.copying < 0.7  # codes last 80 ms, of 20
    assert found.entropy == pytest.approx(np.log(NUM_CODES), abs=0.02)
    said = by_what(config, workdir)["curve it1: expected"].reason
    assert f"an accuracy of {found.copying:.3f}" in said
    for changed in (dict(train__labels="('it0',)"), dict(batch__min_seconds=-1.0)):
        assert labels.guesses(workdir / "it1", get_config(root, **changed)) is None
    copy = epath.Path(tmp_path / "it1")
    shutil.copytree(workdir / "it1", copy)
    for rate in ("x", None, -50):
        card = json.loads((copy / "labels" / "train" / "card.json").read_text())
        card["rate"] = rate
        (copy / "labels" / "train" / "card.json").write_text(json.dumps(card))
        assert labels.guesses(copy, config) is None
    assert labels.guesses(epath.Path(tmp_path), config) is None


def test_the_exit_code_tells_whether_to_stop(clean, capsys):
    root, workdir = clean
    flags = [f"--config={DEMO}:it1", f"--workdir={workdir}", f"--config.corpus.train={root}/train"]
    flags += [f"--config.kmeans.num_codes={NUM_CODES}", "--config.batch.row_multiple=8"]
    flags += ["--config.batch.seconds=16.1"]
    with pytest.raises(SystemExit) as ended:
        doctor.main(flags)
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        doctor.main([*flags, "--config.optim.warmup_steps=5000"])
    assert ended.value.code == 1
    assert "-> set optim.warmup_steps" in capsys.readouterr().out
