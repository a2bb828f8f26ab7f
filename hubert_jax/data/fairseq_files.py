# SPDX-License-Identifier: Apache-2.0
"""fairseq's files, so that a project can move here and back: audio, labels and centres.

    NAME.tsv      a manifest: the folder of the audio, then "path<TAB>number of samples" lines
    NAME.km       labels: a line for each of the manifest's, numbers with spaces between them
    dict.km.txt   "code count" lines, one for each of the K codes
    km.npy        centres (C, D). fairseq and scikit-learn keep theirs in joblib's pickles, which
                  run code when they are opened: here they never are

C codes, D width
"""

import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from hubert_jax.data import cards
from hubert_jax.data.utterance import cut_from, id_of
from hubert_jax.ops import frames

DICTIONARY = "dict.km.txt"
# What our splits are called; the first is fairseq's own.
NAMES = {"train": ("train",), "validation": ("valid", "validation"), "test": ("test",)}


# Manifests.


class Row(NamedTuple):
    path: str  # below the root
    num_samples: int  # at the file's own rate


class Manifest(NamedTuple):
    root: str
    rows: list[Row]


def read_manifest(path: epath.PathLike) -> Manifest:
    """A .tsv; a root that is not absolute is taken from the .tsv's folder. Raises ValueError."""
    lines = cards.read_text(path).splitlines()
    if not lines or "\t" in lines[0]:
        raise ValueError(f"{path}: the first line of a manifest is the folder of the audio")
    root = os.path.join(os.path.dirname(os.path.abspath(path)), lines[0].strip())
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        name, tab, num_samples = line.rstrip().partition("\t")
        if not name:
            continue
        if not tab or not num_samples.isdigit():
            raise ValueError(f"{path}, line {number}: {line!r} is not 'path<TAB>number of samples'")
        normal = os.path.normpath(name)
        if os.path.isabs(normal) or normal.split(os.sep)[0] == "..":
            raise ValueError(
                f"{path}, line {number}: {name!r} leads out of {root}; to allow it, name in line 1"
                " a folder that holds all of the audio, and give every path below that"
            )
        rows.append(Row(normal, int(num_samples)))
    return Manifest(root, rows)


def write_manifest(path: epath.PathLike, manifest: Manifest) -> None:
    lines = [manifest.root, *(f"{name}\t{num_samples}" for name, num_samples in manifest.rows)]
    with cards.whole(path) as unfinished:
        unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")


# Labels.


class LabelFile:
    """A .km file, every line of which is checked; read line by line, as it may be large.

    >>> labels = LabelFile("train.km", num_lines=len(manifest.rows), num_codes=500)
    >>> labels.read(Stretch("ann/1", line=7, first=0, num_labels=labels.lengths[7]))
    """

    def __init__(
        self,
        path: epath.PathLike,
        *,
        num_lines: int,
        num_codes: int,
        report: Callable[[int], None] = lambda num_bytes: None,
    ):
        """Reads the whole file once; `report` is told the bytes of each line."""
        self.path, self.num_codes = epath.Path(path), num_codes
        self._starts, self.lengths = [0], []  # bytes; labels of every line
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                self.lengths.append(len(self._parse(line, number)))
                self._starts.append(self._starts[-1] + len(line))
                report(len(line))
        if len(self.lengths) != num_lines:
            raise ValueError(
                f"{path}: {len(self.lengths)} lines of labels for {num_lines} in"
                f" {self.path.with_suffix('.tsv').name}; the two belong together line by line: give"
                " those of one run of fairseq, whose parts (train_0_8.km, ...) are all put together"
            )

    def read(self, stretch: "Stretch") -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self._starts[stretch.line])
            labels = self._parse(file.readline(), stretch.line + 1)
        return labels[stretch.first : stretch.first + stretch.num_labels]

    def _parse(self, line: bytes, number: int) -> np.ndarray:
        try:
            labels = np.array(line.split(), np.int64)
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{self.path}, line {number}: not whole numbers with spaces between them ({error})"
            ) from error
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_codes:
            raise ValueError(
                f"{self.path}, line {number}: labels from {labels.min()} to {labels.max()}, but"
                f" there are {self.num_codes} codes, 0 to {self.num_codes - 1}; is kmeans.num_codes"
                f" that of these labels, and {DICTIONARY} theirs?"
            )
        return labels


def write_labels(path: epath.PathLike, labels: Iterable[np.ndarray]) -> None:
    with cards.whole(path) as unfinished, unfinished.open("w") as file:
        for labels_T in labels:
            file.write(" ".join(map(str, labels_T.tolist())) + "\n")


def read_dictionary(path: epath.PathLike) -> int:
    """K, the number of codes. Raises ValueError unless they are 0 to K - 1, in any order."""
    lines = cards.read_text(path).splitlines()
    codes = [line.partition(" ")[0] for line in lines]
    wrong = set(codes) ^ {str(code) for code in range(len(lines))}
    if wrong or not lines:
        raise ValueError(
            f"{path}: {len(lines)} lines that do not name the codes 0 to {len(lines) - 1} once"
            f" each (look for {', '.join(map(repr, sorted(wrong)[:4]))}); fairseq's has a line"
            " 'CODE 1' for every code"
        )
    return len(lines)


def write_dictionary(path: epath.PathLike, num_codes: int) -> None:
    with cards.whole(path) as unfinished:
        unfinished.write_text("".join(f"{code} 1\n" for code in range(num_codes)))


# Labels of a corpus.


class Stretch(NamedTuple):
    """Where the labels of an utterance are: `num_labels` from number `first` of a line on."""

    id: str
    line: int
    first: int
    num_labels: int


def match(
    ids: Sequence[str], num_samples: Sequence[int], rows: Sequence[Row], labels: LabelFile, *, rate
) -> list[Stretch]:
    """The stretch of every utterance of a split of a corpus, in the manifest's order.

    Rows without an utterance are left out. The pieces of a recording that prepare has cut take the
    labels nearest to theirs in time, half a frame off at most, and up to one at its end.
    Raises ValueError for an utterance without labels and for a wrong number of them.
    """
    hop = frames.SAMPLE_RATE // rate
    lengths = dict(zip(ids, num_samples, strict=True))
    pieces: dict[str, list[str]] = {}
    for id_ in ids:
        recording = cut_from(id_)
        if recording is not None:
            pieces.setdefault(recording, []).append(id_)
    found: dict[str, Stretch] = {}
    for line, row in enumerate(rows):
        whole = id_of(row.path)
        parts = [whole] if whole in lengths else pieces.get(whole, [])
        if not parts:
            continue
        if parts[0] in found:
            raise ValueError(
                f"{labels.path}: utterance {parts[0]!r} is in lines {found[parts[0]].line + 1} and"
                f" {line + 1}; an id is the path without its extension: leave one of them out"
            )
        total = sum(lengths[id_] for id_ in parts)
        if parts != [whole] and total != row.num_samples:
            raise ValueError(
                f"{labels.path}: {whole!r} has {row.num_samples} samples in the manifest, but its"
                f" {len(parts)} pieces in the corpus have {total}: silence was left out, or it was"
                " resampled, and where the pieces begin is not known; prepare the corpus with a"
                " larger corpus.max_seconds, or make the labels here with hubert label"
            )
        want = frames.num_frames(total, hop=hop)
        if labels.lengths[line] != want:
            raise ValueError(
                f"{labels.path}, line {line + 1}: utterance {whole!r} has {labels.lengths[line]}"
                f" labels, its {total} samples at {rate} labels per second have {want}; made at"
                " another rate (--rate=50 or 100), or from other audio?"
            )
        start = 0  # of the piece, in the recording
        for id_ in parts:
            count = frames.num_frames(lengths[id_], hop=hop)
            found[id_] = Stretch(id_, line, min((start + hop // 2) // hop, want - count), count)
            start += lengths[id_]
    missing = [id_ for id_ in ids if id_ not in found]
    if missing:
        raise ValueError(
            f"{labels.path}: no labels for {len(missing)} of {len(ids)} utterances, {missing[0]!r}"
            f" for one; the manifest has {id_of(rows[0].path) if rows else 'nothing'!r}. An id is"
            " the path below the root: corpus and manifests must have the same root and splits, as"
            " with corpus.train=tsv:DIR/train.tsv and corpus.validation=tsv:DIR/valid.tsv"
        )
    return list(found.values())


# Centres.


def read_centers(path: epath.PathLike) -> np.ndarray:
    """float32 (C, D) of an .npy, or of the .npz array that has a known name or is alone."""
    centers_CD = _centers(epath.Path(path))
    if centers_CD.ndim != 2 or centers_CD.dtype.kind != "f":
        raise ValueError(
            f"{path}: {centers_CD.dtype} of shape {centers_CD.shape}; centres are floats, a row for"
            " each code: cluster_centers_ of scikit-learn's k-means"
        )
    centers_CD = centers_CD.astype(np.float32)
    broken = np.flatnonzero(~np.isfinite(centers_CD).all(axis=1))
    if len(broken):
        raise ValueError(
            f"{path}: {len(broken)} of {len(centers_CD)} centres are not finite in float32, code"
            f" {broken[0]} for one; fit the k-means again"
        )
    return centers_CD


def write_centers(path: epath.PathLike, centers_CD: np.ndarray) -> None:
    with cards.whole(path) as unfinished, unfinished.open("wb") as file:
        np.save(file, centers_CD.astype(np.float32))


def _centers(path: epath.Path) -> np.ndarray:
    with path.open("rb") as file:
        if not file.read(6).startswith((b"\x93NUMPY", b"PK\x03\x04")):
            raise ValueError(_pickled(path))
        file.seek(0)
        try:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            arrays = dict(loaded)
        except cards.DAMAGED as error:
            if "allow_pickle" in str(error):
                raise ValueError(_pickled(path)) from error
            raise ValueError(f"{path}: broken ({error}); copy it again") from error
    for name in ("centers_CD", "cluster_centers_"):
        if name in arrays:
            return arrays[name]
    tables = [name for name, array in arrays.items() if array.ndim == 2]
    if len(tables) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"{path}: which array has the centres? There are {shapes or 'none'}; call it"
            " cluster_centers_, or save it alone as .npy"
        )
    return arrays[tables[0]]


def _pickled(path: epath.Path) -> str:
    """The refusal of a file that is not plain numpy, with the command that converts it."""
    program = (
        f"import joblib, numpy\nnumpy.save({json.dumps(os.fspath(path.with_suffix('.npy')))},"
        f" joblib.load({json.dumps(os.fspath(path))}).cluster_centers_)"
    )
    return (
        f"{path}: not plain arrays (.npy, .npz). What joblib or pickle wrote, as fairseq's km.bin,"
        " runs code when it is opened, and is not opened here. If you trust it, where scikit-learn"
        f" is installed:\n  python -c {shlex.quote(program)}\nthen give"
        f" {path.with_suffix('.npy')}"
    )
