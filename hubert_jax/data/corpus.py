# SPDX-License-Identifier: Apache-2.0
"""The corpus on disk, a TFDS data set, and reading it for every stage; data/assembly.py writes it.

    FOLDER/speech-train.array_record-00000-of-00064   records: id, audio (FLAC bytes, 16 kHz mono),
                                                      num_samples, speaker, text
    FOLDER/dataset_info.json, features.json           what TFDS needs to know
    FOLDER/train.npz                                  index: ids, num_samples, speakers, shards,
                                                      digests (8 bytes of each SHA-256 of samples)
    FOLDER/train.phones.npz, train.words.npz          times, where there are any; for scoring only
    FOLDER/rejected.tsv                               what was left out, and why
    FOLDER/card.json                                  written last

Without this package: `tfds.builder_from_directory(FOLDER).as_data_source("train")`.

Dimensions: S samples (16 kHz), U utterances of a split.
"""

import functools
import threading
from typing import Any

import numpy as np
import soundfile
from array_record.python import array_record_module
from etils import epath

from hubert_jax.data import alignments, audio, cards, places
from hubert_jax.data.utterance import Intervals
from hubert_jax.ops import frames

SPLITS = ("train", "validation", "test")
NAME = "speech"  # the data set's, in TFDS and in the shards' file names


class Corpus:
    """A finished corpus.

    >>> corpus = Corpus("WORK/corpus")
    >>> train = corpus.split("train")
    >>> train.audio(0)    # float32 S
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        path = self.folder / "card.json"
        self.card = cards.read(path)
        cards.require(path, self.card, kind="corpus", sample_rate=frames.SAMPLE_RATE)
        self.splits = tuple(split for split in SPLITS if split in self.card["splits"])

    def split(self, name: str) -> "Split":
        if name not in self.splits:
            raise ValueError(
                f"{self.folder}: no split {name!r}, it has {', '.join(self.splits)}; "
                f"name audio for it in corpus.{name} and run hubert prepare"
            )
        return Split(self.folder, name)


class Split:
    """Utterances 0 to U - 1 of one split.

    Threads may read it at the same time. A pickled split is a path: it is opened again elsewhere.
    """

    def __init__(self, folder: epath.PathLike, name: str):
        self.folder, self.name = epath.Path(folder), name
        index = _read_index(self.folder / f"{name}.npz")
        self.ids: list[str] = index["ids"].tolist()
        self.num_samples: np.ndarray = index["num_samples"]  # U int64
        self.speakers: list[str] = index["speakers"].tolist()
        self._offsets = np.concatenate([[0], np.cumsum(index["shards"])])
        # U uint64, of the samples; None in a corpus of 0.1.0
        self.digests: np.ndarray | None = index.get("digests")
        self._paths = shard_paths(self.folder, name, len(self._offsets) - 1)
        self._readers: dict[int, Any] = {}
        self._times: dict[str, alignments.Packed | None] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return Split, (self.folder, self.name)

    def __len__(self) -> int:
        return len(self.ids)

    def audio(self, position: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Samples [start, stop) of an utterance, float32 S in [-1, 1]; only these are decoded."""
        flac = self.record(position)["audio"]
        try:
            return audio.decode(flac, start, stop)
        except soundfile.SoundFileError as error:
            shard = int(np.searchsorted(self._offsets, position, side="right")) - 1
            raise self._damaged(shard, position, error) from error

    def text(self, position: int) -> str:
        return self.record(position)["text"].decode()

    def phones(self, position: int) -> Intervals | None:
        return self._intervals("phones", position)

    def words(self, position: int) -> Intervals | None:
        return self._intervals("words", position)

    def record(self, position: int) -> dict[str, Any]:
        """An utterance as it is stored; strings are bytes."""
        shard = int(np.searchsorted(self._offsets, position, side="right")) - 1
        reader = self._reader(shard)
        try:
            return features().deserialize_example_np(
                reader.read([int(position - self._offsets[shard])])[0]
            )
        except Exception as error:  # array_record has checksums; its errors are of many kinds
            raise self._damaged(shard, position, error) from error

    def _damaged(self, shard: int, position: int, error: Exception) -> ValueError:
        return ValueError(
            f"{self._paths[shard]}: damaged at utterance {self.ids[position]!r}"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}); remove {self.folder}"
            " and run hubert prepare again"
        )

    def _reader(self, shard: int):
        with self._lock:
            if shard not in self._readers:
                path = self._paths[shard]
                if not path.exists():
                    raise FileNotFoundError(
                        f"{path} is missing; remove {self.folder} and run hubert prepare again"
                    )
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    places.local(path),
                    options="readahead_buffer_size:0",  # for random access
                    file_reader_buffer_size=2**15,
                )
            return self._readers[shard]

    def _intervals(self, kind: str, position: int) -> Intervals | None:
        with self._lock:
            if kind not in self._times:
                path = self.folder / f"{self.name}.{kind}.npz"
                self._times[kind] = _load_times(path) if path.exists() else None
            packed = self._times[kind]
        return None if packed is None else packed[position]


def _load_times(path: epath.Path) -> alignments.Packed:
    return alignments.Packed(cards.read_arrays(path, alignments.Packed.KINDS))


def _read_index(path: epath.Path) -> dict[str, np.ndarray]:
    kinds = {"ids": "U", "num_samples": "i", "speakers": "U", "shards": "i", "digests": "u"}
    index = cards.read_arrays(path, kinds, may_lack=("digests",))  # a corpus of 0.1.0 has none
    lengths = {len(index[name]) for name in ("ids", "num_samples", "speakers")}
    if lengths != {int(index["shards"].sum())} or (index["shards"] < 0).any():
        raise ValueError(
            f"{path}: damaged, its arrays have different lengths; remove {path.parent} and run"
            " hubert prepare again"
        )
    return index


def shard_paths(folder: epath.Path, split: str, num_shards: int) -> list[epath.Path]:
    """TFDS's names for the shards of a split."""
    stem = f"{NAME}-{split}.array_record"
    return [folder / f"{stem}-{n:05d}-of-{num_shards:05d}" for n in range(num_shards)]


@functools.cache
def features():
    """The TFDS features of a record. Text carries any bytes: TFDS's Audio needs TensorFlow."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(doc="path below the source's root, without extension"),
            "audio": tfds.features.Text(doc="FLAC bytes, 16 kHz, mono, 16 bits"),
            "num_samples": tfds.features.Scalar(np.int64),
            "speaker": tfds.features.Text(),
            "text": tfds.features.Text(doc="empty where it is not known"),
        }
    )
