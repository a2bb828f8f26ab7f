# SPDX-License-Identifier: Apache-2.0
"""A work directory in a bucket: gs:// paths, and behind them a store in memory that has no files.

Checkpoints are not in this: tensorstore reads and writes those, past any fake of Python's.
"""

import os

import numpy as np
import pytest
from etils import epath
from fsspec.implementations import memory

from hubert_jax import checkpoints, logs
from hubert_jax.data import arrays, cards, places
from hubert_jax.stages import cluster, features, label, prepare
from tests.test_loop import get_config, write_tones


class Bucket(memory.MemoryFileSystem):
    """Whatever lies under gs://."""

    protocol = ("gs", "gcs")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch) -> epath.Path:
    fake = Bucket(global_store=False)
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: fake)
    return epath.Path("gs://bucket")


def test_the_labels_are_those_of_a_work_directory_on_disk(bucket, tmp_path):
    write_tones(tmp_path / "tones")
    config = get_config(tmp_path / "tones")("it1")
    for workdir in (bucket / "work", epath.Path(tmp_path / "work")):
        for stage in (prepare, features, cluster, label):
            stage.run(config, workdir)
    for path in ("corpus", "it1/features", "it1/labels/train", "it1/labels/validation"):
        there, here = bucket / "work" / path, epath.Path(tmp_path / "work" / path)
        assert {p.name for p in there.iterdir()} == {p.name for p in here.iterdir()}
        ours, theirs = cards.read(there / "card.json"), cards.read(here / "card.json")
        assert ours.get("shards") == theirs.get("shards")
        assert ours.get("fingerprint") == theirs.get("fingerprint")
    assert not os.path.exists("gs:")


def test_what_is_done_in_a_bucket_is_not_done_again(bucket, tmp_path, capsys):
    write_tones(tmp_path / "tones")
    config = get_config(tmp_path / "tones")("it1")
    for _ in range(2):
        for stage in (prepare, features):
            stage.run(config, bucket / "work")
    output = capsys.readouterr().out
    assert "corpus is there" in output and "features: done before" in output


def test_files_appear_whole_or_not_at_all(bucket):
    path = bucket / "folder" / "file"
    with pytest.raises(RuntimeError), cards.whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert not path.exists()
    with cards.whole(path) as unfinished:
        unfinished.write_text("all")
        assert not path.exists() and places.is_local(unfinished)
    assert path.read_text() == "all" and not unfinished.parent.exists()


def test_a_copy_is_made_once_and_again_where_the_file_has_changed(bucket):
    path = bucket / "numbers.npy"
    with cards.whole(path) as unfinished:
        np.save(unfinished, np.arange(3))
    copy = places.local(path)
    assert places.local(path) == copy and np.load(copy).tolist() == [0, 1, 2]
    with cards.whole(path) as unfinished:
        np.save(unfinished, np.arange(50))
    assert len(np.load(places.local(path))) == 50
    assert places.local(copy) == copy


def test_a_store_in_a_bucket_is_read_by_its_utterances(bucket):
    arrays.write_store(
        bucket / "store", ids=["a", "b"], lengths=np.array([2, 3]), width=None, dtype="int16",
        num_shards=2, card=cards.new("labels", made_from={}),
        produce=lambda places: ((n, np.full(n + 2, n, np.int16)) for n in places.tolist()),
    )  # fmt: skip
    assert arrays.Store(bucket / "store")["b"].tolist() == [1, 1, 1]


def test_metrics_in_a_bucket_go_on_where_they_stopped(bucket):
    for first, last in ((0, 4), (2, 5)):
        with logs.Metrics(bucket / "logs", resume_from=first) as metrics:
            for step in range(first + 1, last + 1):
                metrics.write(step, {"loss": first})
    lines = logs.read_metrics(bucket / "logs" / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [
        (1, 0), (2, 0), (3, 2), (4, 2), (5, 2)
    ]  # fmt: skip
    assert any("tfevents" in path.name for path in (bucket / "logs").iterdir())


def test_a_checkpoint_in_a_bucket_is_not_looked_for_on_the_disk(bucket, monkeypatch):
    folder = bucket / "work" / "it1" / "checkpoints"
    for step in ("9", "10"):
        cards.write(folder / step / "params" / "card.json", cards.new("params", made_from={}))
        (folder / step / "commit_success.txt").write_text("")  # Orbax' mark in a bucket
    assert os.fspath(checkpoints.resolve(folder)) == os.fspath(folder / "10")
    assert os.fspath(checkpoints.resolve(folder / "9")) == os.fspath(folder / "9")
    folders = []
    monkeypatch.setattr(checkpoints, "_Manager", lambda path, **_: folders.append(path))
    checkpoints.Checkpoints(folder, checkpoints.CheckpointConfig(1, 1, 0))
    assert [os.fspath(path) for path in folders] == [os.fspath(folder)]


def test_a_checkpoint_half_written_is_not_the_newest(bucket):
    for step in ("5", "10"):
        cards.write(bucket / step / "params" / "card.json", cards.new("params", made_from={}))
    (bucket / "5" / "commit_success.txt").write_text("")
    assert os.fspath(checkpoints.resolve(bucket)) == os.fspath(bucket / "5")
