# SPDX-License-Identifier: Apache-2.0
"""The corpus on disk: written by shards, read by us and by TFDS."""

import concurrent.futures
import errno
import hashlib
import pickle

import numpy as np
import pytest
from etils import epath

from hubert_jax.data import assembly, audio, cards, corpus
from hubert_jax.data.assembly import Record, Shard, ShardWriter
from hubert_jax.data.corpus import Corpus
from hubert_jax.data.utterance import Intervals


def record(n):
    """Utterance n: noise of its own length; every second one has phones, one has words."""
    samples = np.random.default_rng(n).integers(-9000, 9000, 1000 + 100 * n).astype(np.int16)
    phones = Intervals(np.array([0, 400]), np.array([400, 900]), ("sil", f"p{n}"))
    words = Intervals(np.array([400]), np.array([900]), ("word",))
    return Record(
        id=f"s{n % 3}/\u00fc{n}",
        audio=audio.encode(samples),
        num_samples=len(samples),
        speaker=f"s{n % 3}",
        text=f"text \u00fc {n}",
        digest=hashlib.sha256(samples.tobytes()).digest(),
        phones=phones if n % 2 else None,
        words=words if n == 4 else None,
    )


def write(folder, splits):
    """`splits`: by name, the records of every shard."""
    folder = epath.Path(folder)
    made = {}
    for split, shards in splits.items():
        for number, records in enumerate(shards):
            writer = ShardWriter(folder / "unfinished", f"{split}-{number}")
            for one in records:
                writer.add([one], [], 16_000)
            writer.finish()
            shard = Shard(folder / "unfinished", f"{split}-{number}")
            made.setdefault(split, []).append(shard)
    numbers = assembly.assemble(folder, made)
    cards.write(folder / "card.json", cards.new("corpus", made_from={}, **numbers))
    return Corpus(folder)


TRAIN = [[record(0), record(1), record(2)], [], [record(3), record(4)]]
VALIDATION = [[record(5)]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus"), {"train": TRAIN, "validation": VALIDATION})


def test_everything_comes_back(made):
    assert made.splits == ("train", "validation")
    train = made.split("train")
    records = [one for shard in TRAIN for one in shard]
    assert len(train) == 5 and train.ids == [one.id for one in records]
    assert train.speakers == [one.speaker for one in records]
    np.testing.assert_array_equal(train.num_samples, [one.num_samples for one in records])
    for n, one in enumerate(records):
        audio_S = train.audio(n)
        assert audio_S.dtype == np.float32 and len(audio_S) == one.num_samples
        samples = (audio_S * 32768).astype("<i2")
        assert hashlib.sha256(samples.tobytes()).digest() == one.digest
        np.testing.assert_array_equal(train.audio(n, 320, 960), audio_S[320:960])
        assert train.text(n) == one.text
        for got, want in ((train.phones(n), one.phones), (train.words(n), one.words)):
            assert (got is None) == (want is None)
            if want is not None:
                np.testing.assert_array_equal(got.starts, want.starts)
                np.testing.assert_array_equal(got.stops, want.stops)
                assert got.names == want.names
    assert made.split("validation").phones(0).names == ("sil", "p5")
    assert made.split("validation").words(0) is None
    assert made.card["splits"]["train"] == {
        "utterances": 5,
        "speakers": 3,
        "hours": round(6000 / 16_000 / 3600, 4),
        "with_phones": 2,
        "with_words": 1,
    }


def test_tfds_reads_it_without_us(made):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(made.folder)
    assert builder.info.splits["train"].shard_lengths == [3, 2]  # the empty shard is gone
    source = builder.as_data_source("train")
    train = made.split("train")
    assert len(source) == len(train)
    for n, example in enumerate(source):
        assert set(example) == {"id", "audio", "num_samples", "speaker", "text"}
        assert example["id"].decode() == train.ids[n]
        assert example["num_samples"] == train.num_samples[n]
        np.testing.assert_array_equal(audio.decode(example["audio"]), train.audio(n))


def test_a_pickled_split_and_threads_read_the_same(made):
    train = made.split("train")
    want = [train.audio(n) for n in range(5)]
    other = pickle.loads(pickle.dumps(train))  # noqa: S301 - our own, to another process
    assert len(pickle.dumps(train)) < 1000
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        order = list(range(5)) * 40
        for n, audio_S in zip(order, threads.map(other.audio, order), strict=True):
            np.testing.assert_array_equal(audio_S, want[n])


def test_fingerprint_is_of_ids_and_samples(made, tmp_path):
    def fingerprint(name, train):
        return write(tmp_path / name, {"train": train, "validation": VALIDATION}).card[
            "fingerprint"
        ]

    assert fingerprint("same", TRAIN) == made.card["fingerprint"]
    flat = [one for shard in TRAIN for one in shard]
    assert fingerprint("other shards", [flat]) == made.card["fingerprint"]
    renamed = [flat[0]._replace(id="other"), *flat[1:]]
    changed = [flat[0]._replace(digest=bytes(32)), *flat[1:]]
    others = {
        fingerprint("order", [flat[::-1]]),
        fingerprint("name", [renamed]),
        fingerprint("audio", [changed]),
        fingerprint("fewer", [flat[:-1]]),
    }
    assert len(others) == 4 and made.card["fingerprint"] not in others


def test_assembling_can_be_repeated(tmp_path):
    """A run that is killed after some shards were renamed finds them where they are."""
    first = write(tmp_path, {"train": TRAIN, "validation": VALIDATION})
    names = {"train": ["train-0", "train-1", "train-2"], "validation": ["validation-0"]}
    folder = first.folder / "unfinished"
    again = {split: [Shard(folder, name) for name in names[split]] for split in names}
    assert assembly.assemble(first.folder, again)["fingerprint"] == first.card["fingerprint"]
    assert Corpus(first.folder).split("train").text(4) == record(4).text


def test_what_is_missing_is_named(made, tmp_path):
    with pytest.raises(ValueError, match="no split 'test', it has train, validation"):
        made.split("test")
    with pytest.raises(FileNotFoundError, match=r"card\.json: no card"):
        Corpus(tmp_path)
    cards.write(tmp_path / "card.json", cards.new("labels", made_from={}))
    with pytest.raises(ValueError, match="kind is 'labels', expected 'corpus'"):
        Corpus(tmp_path)
    broken = write(tmp_path / "broken", {"train": TRAIN})
    corpus.shard_paths(broken.folder, "train", 2)[1].unlink()
    train = broken.split("train")
    train.audio(2)
    with pytest.raises(FileNotFoundError, match="00001-of-00002 is missing; remove"):
        train.audio(3)


def test_a_full_disk_is_explained(monkeypatch, tmp_path):
    """array_record raises a RuntimeError; /dev/full stands for the disk."""
    real = assembly.array_record_module.ArrayRecordWriter
    on_full_disk = lambda path, options: real("/dev/full", options)  # noqa: E731
    monkeypatch.setattr(assembly.array_record_module, "ArrayRecordWriter", on_full_disk)
    writer = ShardWriter(epath.Path(tmp_path), "train-0")
    with pytest.raises(OSError, match=r"no space left writing .*train-0\.array_record; free"):
        try:
            writer.add([record(0)], [], 16_000)
            writer.finish()
        except OSError as error:
            assert error.errno == errno.ENOSPC
            writer.discard(error)
    assert not list(tmp_path.iterdir())


def test_digests_may_be_absent_as_in_older_corpora_but_not_damaged(tmp_path):
    opened = write(tmp_path, {"validation": VALIDATION})
    whole = record(5).digest
    assert opened.split("validation").digests.tolist() == [int.from_bytes(whole[:8], "little")]
    path = tmp_path / "validation.npz"
    with np.load(path) as index:
        arrays = dict(index)
    np.savez(path, **(arrays | {"digests": np.array(["x"])}))
    with pytest.raises(ValueError, match=r"validation\.npz: digests"):
        opened.split("validation")
    del arrays["digests"]
    np.savez(path, **arrays)
    assert opened.split("validation").digests is None
