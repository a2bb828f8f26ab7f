# SPDX-License-Identifier: Apache-2.0
"""The doctor before there is a corpus: hours and disk from the audio's files."""

import pathlib
import re
import shutil

import pytest
import soundfile
from etils import epath

from hubert_jax import bucket_locks
from hubert_jax.doctor import data, disk
from hubert_jax.stages import doctor
from tests import test_bucket
from tests.stages.doctor_project import (
    SAMPLE_RATE,
    by_what,
    get_config,
    not_ok,
    speech,
)


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
    monkeypatch.setattr(bucket_locks, "owner_of", lambda folder: None)
    found = by_what(get_config(root), epath.Path("gs://bucket/work"))["disk"]
    assert found.level == "ok" and found.reason.endswith("free in a bucket is not known")
    assert "corpus 1." in found.reason
