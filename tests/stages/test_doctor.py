# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what was planted, one fault at a time, and nothing where nothing was."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import soundfile
from etils import epath

from hubert_jax import config_files
from hubert_jax.data import arrays, cards, codebooks
from hubert_jax.data.corpus import Corpus
from hubert_jax.doctor import curves, data, disk, findings
from hubert_jax.ops import frames
from hubert_jax.stages import doctor, prepare
from tests import test_bucket

DEMO = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"
SAMPLE_RATE, NUM_CODES = 16_000, 20


def speech(seed: int, *, seconds: float = 2.5) -> np.ndarray:
    """Noise that swells and fades a few times a second, never silent for long."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.03 + 0.1 * np.sin(12 * time) ** 2) * rng.normal(size=len(time)).clip(-3, 3)


def write_audio(root: pathlib.Path, *, change=lambda n, wave: wave, rate: int = SAMPLE_RATE):
    """24 recordings of six speakers to train on, six of three others; `change` sees each."""
    for n in range(30):
        part, speaker = ("train", n % 6) if n < 24 else ("validation", 6 + n % 3)
        path = root / part / f"speaker{speaker}" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, change(n, speech(n)), rate, subtype="PCM_16")


def get_config(root: pathlib.Path, **changes):
    fields = {
        "corpus.train": root / "train", "corpus.validation": root / "validation",
        "corpus.num_workers": 0, "corpus.num_shards": 1, "kmeans.num_codes": NUM_CODES,
        "batch.row_multiple": 8, "batch.seconds": 16.1, "train.num_steps": 300,
        "optim.warmup_steps": 30, "checkpoints.every": 100, "features.sample_share": 1.0,
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    return config_files.load(f"{DEMO}:it1", [f"--config.{k}={v}" for k, v in fields.items()])


def codes_of(num_frames: int, seed: int) -> np.ndarray:
    """Codes that last about eight frames of 10 ms, all about equally frequent."""
    rng = np.random.default_rng(seed)
    runs = rng.integers(3, 14, num_frames)
    return np.repeat(rng.integers(0, NUM_CODES, num_frames), runs)[:num_frames].astype(np.int16)


def write_labels(workdir: epath.Path, *, change=lambda codes: codes, corpus_id: str = "") -> None:
    """A codebook and labels, as `hubert cluster` and `hubert label` leave them."""
    corpus, folder = Corpus(workdir / "corpus"), workdir / "it1"
    codebook = folder / "codebook.npz"
    centers_CD = np.random.default_rng(0).normal(size=(NUM_CODES, 39)).astype(np.float32)
    codebooks.write(codebook, centers_CD, made_from={}, source={}, rate=100, arrays={})
    for name in corpus.splits:
        split = corpus.split(name)
        lengths = frames.num_frames(split.num_samples, hop=frames.MFCC_HOP)
        arrays.write_store(
            folder / "labels" / name, ids=split.ids, lengths=lengths, width=None, dtype="int16",
            num_shards=2,
            produce=lambda rows, n=lengths: [(row, change(codes_of(n[row], row))) for row in rows],
            card=cards.new(
                "labels", made_from={}, corpus=corpus_id or corpus.card["fingerprint"],
                codebook=cards.digest(codebook), num_codes=NUM_CODES, rate=100,
            ),
        )  # fmt: skip


def write_metrics(workdir: epath.Path, *, change=lambda row: row) -> None:
    """A loss that falls as it should."""
    lines = []
    for step in range(20, 301, 20):
        row = {
            "masked_loss": 3.0 * 0.97 ** (step / 20), "masked_accuracy": step / 1000,
            "predicted_perplexity": min(2 + step / 20, 15.0), "label_perplexity": 16.0,
            "audio_seconds": 16.0, "audio_seconds_per_second": 40.0,
            "seconds_waited_for_data": 0.1, "skipped": 0.0, "gradient_norm": 2.0,
        }  # fmt: skip
        row = change(row | {"step": step})
        lines.append(json.dumps({k if k == "step" else f"train/{k}": v for k, v in row.items()}))
    path = pathlib.Path(workdir / "it1" / "logs" / "metrics.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """(audio, work directory) of a run in the middle, in which all is well."""
    folder = tmp_path_factory.mktemp("doctor")
    write_audio(folder / "audio")
    workdir = epath.Path(folder / "work")
    prepare.run(get_config(folder / "audio"), workdir)
    write_labels(workdir)
    write_metrics(workdir)
    return folder / "audio", workdir


def not_ok(config, workdir) -> dict[str, findings.Finding]:
    return {f.what: f for f in doctor.examine([config], workdir) if f.level != "ok"}


def test_nothing_is_found_where_nothing_is_wrong(clean):
    root, workdir = clean
    found = doctor.examine([get_config(root)], workdir)
    assert not [finding for finding in found if finding.level != "ok"]
    assert len(found) > 30


def test_before_a_run_there_is_nothing_but_sources_and_a_plan(clean, tmp_path):
    root, _ = clean
    assert not not_ok(get_config(root), epath.Path(tmp_path / "work"))
    assert not (tmp_path / "work").exists()
    gone = not_ok(get_config(tmp_path / "nowhere"), epath.Path(tmp_path / "work"))
    assert gone["audio: sources"].level == "stop"
    assert gone["disk"].level == "look" and "not known" in gone["disk"].reason
    for fault in (dict(train=""), dict(test="synth"), dict(exclude="."), dict(speaker_pattern="(")):
        config = get_config(root)
        config.corpus.update(fault)
        found = not_ok(config, epath.Path(tmp_path / "work"))
        assert found["audio: sources"].level == "stop"


def by_what(config, workdir) -> dict[str, findings.Finding]:
    return {finding.what: finding for finding in doctor.examine([config], workdir)}


def to_come(config, workdir) -> dict[str, float]:
    """MB that the finding of the disk tells, by stage."""
    reason = by_what(config, workdir)["disk"].reason
    return {name: float(num) for name, num in re.findall(r"([a-z][\w ]*) ([\d.]+) MB[,)]", reason)}


def test_before_a_run_the_disk_is_held_against_what_will_be_prepared(clean, tmp_path):
    root, finished = clean
    config, workdir = get_config(root), epath.Path(tmp_path / "work")
    assert "about 0.02 h (30 files)" in by_what(config, workdir)["audio: hours"].reason
    before = to_come(config, workdir)
    shards = (finished / "corpus").glob("*.array_record*")
    assert 0.5 < 1e6 * before["corpus"] / sum(path.stat().length for path in shards) < 2
    (workdir / "corpus" / "unfinished").mkdir(parents=True)
    shard = workdir / "corpus" / "unfinished" / "train-00000.array_record"
    shard.write_bytes(bytes(1_000_000))
    assert to_come(config, workdir)["corpus"] == pytest.approx(before["corpus"] - 1)
    shutil.rmtree(workdir)
    shutil.copytree(finished / "corpus", workdir / "corpus")
    after = to_come(config, workdir)
    assert set(after) == {"it1 features", "it1 labels", "it1 checkpoints"}
    assert before == {"corpus": before["corpus"]} | after


def test_a_disk_that_only_the_corpus_will_not_fit_on_is_found(clean, tmp_path, monkeypatch):
    root, finished = clean
    monkeypatch.setattr(doctor, "free_bytes", lambda workdir: 1_500_000)
    config, workdir = get_config(root, train__num_steps=0), epath.Path(tmp_path / "work")
    assert {what: f.level for what, f in not_ok(config, workdir).items()} == {"disk": "stop"}
    shutil.copytree(finished / "corpus", workdir / "corpus")
    assert not not_ok(config, workdir)


def no_audio(path: pathlib.Path) -> None:
    path.write_bytes(bytes(1000))


def flac_of_unknown_length(path: pathlib.Path) -> None:
    """As an encoder leaves it that writes into a pipe: 0 samples in all."""
    soundfile.write(path, speech(0), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    flac = bytearray(path.read_bytes())
    flac[21] &= 0xF0  # the last 36 bits of 8 bytes, after 4 of magic, 4 of a header, 10 of sizes
    flac[22:26] = bytes(4)
    path.write_bytes(flac)


@pytest.mark.parametrize("write", [no_audio, flac_of_unknown_length])
def test_audio_that_tells_no_length_is_never_nothing_to_come(write, tmp_path):
    (tmp_path / "audio").mkdir()
    write(tmp_path / "audio" / "1.flac")
    config = get_config(tmp_path, corpus__train=tmp_path / "audio", corpus__validation="")
    found = not_ok(config, epath.Path(tmp_path / "work"))
    assert {what: f.level for what, f in found.items()} == {"audio: hours": "look", "disk": "look"}
    assert "corpus, features and labels: not known" in found["disk"].reason


def test_an_archive_is_measured_by_its_size_alone(tmp_path):
    (tmp_path / "train.tar.gz").write_bytes(bytes(10 * disk.FLAC_BYTES_PER_SECOND))
    source = f"librispeech:{tmp_path}/train.tar.gz"
    config = get_config(tmp_path, corpus__train=source, corpus__validation="")
    found, num_samples = data.of_sources(config.corpus)
    assert num_samples == {"train": 10 * SAMPLE_RATE, "validation": 0, "test": 0}
    assert "(1 archives)" in found[1].reason


def test_of_a_bucket_it_is_not_known_what_is_free(clean, monkeypatch):
    root, _ = clean
    bucket = test_bucket.Bucket(global_store=False)
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: bucket)
    found = by_what(get_config(root), epath.Path("gs://bucket/work"))["disk"]
    assert found.level == "ok" and found.reason.endswith("free in a bucket is not known")
    assert "corpus 1." in found.reason


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
    "half of the codes unused": (
        relabelled(change=lambda c: c // 2), "look", "labels it1 train: codes"),
    "one code for most": (
        relabelled(change=one_frequent_code), "look", "labels it1 train: one code"),
    "labels like noise": (
        relabelled(change=lambda c: np.random.default_rng(0).permutation(c)),
        "look", "labels it1 train: runs"),
    "a loss that rose": (
        curve(masked_loss=lambda row: 2.0 if row["step"] < 280 else 2.9),
        "look", "curve it1: rise"),
    "steps that were skipped": (
        curve(skipped=lambda row: float(row["step"] == 100) / 20), "look", "curve it1: skipped"),
    "a model of one code": (
        curve(predicted_perplexity=lambda row: 1.01), "look", "curve it1: one code"),
    "a leak": (curve(masked_accuracy=lambda row: 0.98), "look", "curve it1: accuracy"),
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
    same_cause = {"codebook it1", *(f"labels it1 {s}: {w}" for s in ("train", "validation")
                                    for w in ("files", "codes", "one code", "runs"))}  # fmt: skip
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
    ],
)  # fmt: skip
def test_a_fault_of_the_plan_is_found(clean, changes, level, what):
    root, workdir = clean
    found = not_ok(get_config(root, **changes), workdir)
    assert found[what].level == level and found[what].remedy


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


def test_a_run_of_our_own_recipe_is_held_against_our_curve():
    config = config_files.load(f"{DEMO}:it1")
    (curve_of_it1,) = [c for c in curves.stored() if c["recipe"] == curves.recipe(config)]
    rows = [
        {"step": step, "train/masked_loss": loss, "train/masked_accuracy": accuracy,
         "train/predicted_perplexity": 20.0, "train/label_perplexity": 40.0,
         "train/audio_seconds": 8.0, "train/audio_seconds_per_second": 40.0}
        for step, loss, accuracy in curve_of_it1["points"]
    ]  # fmt: skip
    for until in range(1, len(rows)):
        assert {f.level for f in curves.of_metrics(config, rows[:until], 100)} == {"ok"}
    late = [row | {"train/masked_loss": 4.6} for row in rows]
    found = curves.of_metrics(config, late[:8], 100)
    assert [f.what for f in found if f.level == "look"] == ["curve it1: beside ours"]


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
