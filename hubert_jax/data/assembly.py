# SPDX-License-Identifier: Apache-2.0
"""Writing a corpus: worker processes write shards, `assemble` makes them a TFDS data set.

data/corpus.py says what the files are.
"""

import contextlib
import errno
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from hubert_jax.data import alignments, cards
from hubert_jax.data.corpus import NAME, features, shard_paths
from hubert_jax.data.utterance import Intervals
from hubert_jax.ops import frames

VERSION = "1.0.0"  # of the data set, in TFDS


class Record(NamedTuple):
    """One utterance as it goes into a shard."""

    id: str
    audio: bytes  # FLAC
    num_samples: int
    speaker: str
    text: str
    digest: bytes  # SHA-256 of the 16-bit samples
    phones: Intervals | None
    words: Intervals | None


class ShardWriter:
    """One shard: FOLDER/NAME.array_record, and FOLDER/NAME.npz with what the index will need.

    The .npz is written last: with it the shard is whole.
    """

    def __init__(self, folder: epath.Path, name: str):
        self._index_path = folder / f"{name}.npz"
        self._records: list[Record] = []
        self._rejected: list[tuple[str, str]] = []
        self._sample_rates: list[int] = []
        self._whole = contextlib.ExitStack()
        path = self._whole.enter_context(cards.whole(folder / f"{name}.array_record"))
        with _disk_errors(path):
            self._writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")

    def add(
        self, records: Sequence[Record], rejected: Sequence[tuple[str, str]], sample_rate: int
    ) -> None:
        """What became of one audio file: utterances, and (id, reason) of what is left out."""
        for record in records:
            example = {key: getattr(record, key) for key in features()}
            with _disk_errors(self._index_path):
                self._writer.write(_serialize(example))
            self._records.append(record._replace(audio=b""))
        self._rejected += rejected
        self._sample_rates.append(sample_rate)

    def finish(self) -> None:
        with _disk_errors(self._index_path):
            self._writer.close()
        self._whole.close()
        records = self._records
        arrays = {
            "ids": _strings(record.id for record in records),
            "num_samples": np.array([record.num_samples for record in records], np.int64),
            "speakers": _strings(record.speaker for record in records),
            "digests": np.array([list(record.digest) for record in records], np.uint8),
            "sample_rates": np.array(self._sample_rates, np.int64),
            "rejected": _strings(id_ for id_, _ in self._rejected),
            "reasons": _strings(reason for _, reason in self._rejected),
        }
        for kind in ("phones", "words"):
            packed = alignments.pack([getattr(record, kind) for record in records])
            arrays |= {f"{kind}_{key}": array for key, array in packed.items()}
        _save(self._index_path, arrays)

    def discard(self, error: BaseException) -> None:
        """Removes what was written so far, because of `error`."""
        self._whole.__exit__(type(error), error, error.__traceback__)


_KINDS = {
    "ids": "U", "num_samples": "i", "speakers": "U", "digests": "u", "sample_rates": "i",
    "rejected": "U", "reasons": "U",
    **{f"phones_{name}": kind for name, kind in alignments.Packed.KINDS.items()},
    **{f"words_{name}": kind for name, kind in alignments.Packed.KINDS.items()},
}  # fmt: skip


class Shard:
    """What is known of a shard that a ShardWriter finished."""

    def __init__(self, folder: epath.Path, name: str):
        self.path = folder / f"{name}.array_record"
        arrays = cards.read_arrays(folder / f"{name}.npz", _KINDS)
        self.ids: list[str] = arrays["ids"].tolist()
        self.num_samples: np.ndarray = arrays["num_samples"]
        self.speakers: list[str] = arrays["speakers"].tolist()
        self.digests: np.ndarray = arrays["digests"]
        self.sample_rates: list[int] = arrays["sample_rates"].tolist()
        ids, reasons = arrays["rejected"].tolist(), arrays["reasons"].tolist()
        self.rejected: list[tuple[str, str]] = list(zip(ids, reasons, strict=True))
        self.times = {
            kind: alignments.Packed(
                {key: arrays[f"{kind}_{key}"] for key in alignments.Packed.KINDS}
            )
            for kind in ("phones", "words")
        }

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def short_digests(self) -> np.ndarray:
        """U uint64: enough to tell the recordings of a corpus apart."""
        return np.ascontiguousarray(self.digests.reshape(-1, 32)[:, :8]).view("<u8")[:, 0]


def assemble(folder: epath.Path, splits: Mapping[str, Sequence[Shard]]) -> dict[str, Any]:
    """Makes finished shards the TFDS data set in `folder`; returns the numbers for its card.

    May be interrupted and repeated: the shards are renamed, never copied.
    """
    import tensorflow_datasets as tfds

    fingerprint = hashlib.sha256()
    infos, counts = [], {}
    for name, shards in splits.items():
        shards = [shard for shard in shards if len(shard)]
        for shard, path in zip(shards, shard_paths(folder, name, len(shards)), strict=True):
            if shard.path.exists():
                shard.path.replace(path)
        counts[name] = _write_index(folder, name, shards)
        for shard in shards:
            rows = zip(shard.ids, shard.num_samples, shard.digests, strict=True)
            for id_, num_samples, digest in rows:
                fingerprint.update(f"{name}\t{id_}\t{num_samples}\t".encode() + digest.tobytes())
        paths = shard_paths(folder, name, len(shards))
        infos.append(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[len(shard) for shard in shards],
                num_bytes=sum(path.stat().length for path in paths),
                filename_template=tfds.core.ShardedFileTemplate(
                    folder, dataset_name=NAME, split=name, filetype_suffix="array_record"
                ),
            )
        )
    builder = builder_class()(data_dir=os.fspath(folder), file_format="array_record")
    builder.info.set_splits(tfds.core.SplitDict(infos))
    builder.info.write_to_directory(folder)
    return {
        "sample_rate": frames.SAMPLE_RATE,
        "fingerprint": f"sha256:{fingerprint.hexdigest()}",
        "splits": counts,
    }


def _serialize(example: dict[str, Any]) -> bytes:
    """As TFDS does it, but with the fields of a record in the same order in every process."""
    encoded = features().encode_example(example)
    return _serializer().get_tf_example(encoded).SerializeToString(deterministic=True)


@functools.cache
def _serializer():
    from tensorflow_datasets.core import example_serializer

    return example_serializer.ExampleSerializer(features().get_serialized_info())


@functools.cache
def builder_class():
    """The TFDS builder, made here because TFDS takes most of a second to load."""
    import tensorflow_datasets as tfds

    class Info(tfds.core.DatasetInfo):
        """Not looked up among the public data sets: TFDS leaves a temporary folder each time."""

        def initialize_from_bucket(self):
            pass

    class Speech(tfds.core.ShardBasedBuilder):
        """Speech at 16 kHz in array_record shards, written by the workers of `hubert prepare`."""

        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            return Info(
                builder=self,
                description="Utterances of speech, made by hubert prepare",
                features=features(),
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager):
            raise NotImplementedError("the shards are made by `hubert prepare`, in parallel")

    return Speech


def _write_index(folder: epath.Path, split: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """The files beside the shards of a split; returns its numbers."""
    num_samples = np.concatenate([shard.num_samples for shard in shards])
    speakers = [speaker for shard in shards for speaker in shard.speakers]
    index = {
        "ids": _strings(id_ for shard in shards for id_ in shard.ids),
        "num_samples": num_samples,
        "speakers": _strings(speakers),
        "shards": np.array([len(shard) for shard in shards], np.int64),
        "digests": np.concatenate([shard.short_digests for shard in shards]),
    }
    _save(folder / f"{split}.npz", index)
    counts = {
        "utterances": len(speakers),
        "speakers": len(set(speakers)),
        "hours": round(int(num_samples.sum()) / frames.SAMPLE_RATE / 3600, 4),
    }
    for kind in ("phones", "words"):
        times = alignments.Packed(alignments.merge([shard.times[kind] for shard in shards]))
        counts[f"with_{kind}"] = times.num_aligned
        if times.num_aligned:
            arrays = {key: getattr(times, key) for key in alignments.Packed.KINDS}
            _save(folder / f"{split}.{kind}.npz", arrays | {"names": _strings(times.names)})
    return counts


def _save(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    with cards.whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _strings(values: Iterable[str]) -> np.ndarray:
    return np.array(list(values), dtype=np.str_)


@contextlib.contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
    """array_record's errors are RuntimeErrors whatever happened; a full disk is an OSError."""
    try:
        yield
    except RuntimeError as error:
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"writing {path}: {error}") from error
