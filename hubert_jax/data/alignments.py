# SPDX-License-Identifier: Apache-2.0
"""Phone and word times from the files beside an audio file.

    NAME.phn, NAME.wrd   TIMIT: "first_sample last_sample name" a line, samples of the audio file
    NAME.TextGrid        Praat, as the Montreal Forced Aligner writes it: tiers "phones" and "words"
    NAME.ctm             NIST: "recording channel start duration phone [...]" a line, in seconds
    NAME.words.ctm       the same for words

Times are turned into samples at 16 kHz. `pack` and `Packed` keep those of many utterances in a few
arrays of an .npz file.

Dimensions: N intervals (of one utterance, or of all), U utterances, V names.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from hubert_jax.data.utterance import Intervals
from hubert_jax.ops import frames

SUFFIXES = (".phn", ".wrd", ".textgrid", ".words.ctm", ".ctm")  # compared in lower case
SILENCE = "sil"  # the name of a phone interval without one, which is what Praat leaves for pauses
MAX_OVERHANG = 0.1  # of the audio: aligners round to frames, but another sample rate is further off


class Aligned(NamedTuple):
    phones: Intervals | None
    words: Intervals | None


def parse(texts: dict[str, bytes], *, name: str, sample_rate: int) -> Aligned:
    """Reads the files beside one recording; `texts` maps lower-case suffixes to contents.

    `name` is the audio file's without extension, `sample_rate` its rate. Where two files give the
    same kind of times, the first in SUFFIXES counts. Raises ValueError with the suffix and line.
    """
    phones: Intervals | None = None
    words: Intervals | None = None
    for suffix in SUFFIXES:
        if suffix not in texts:
            continue
        try:
            text = _decode(texts[suffix])
            if suffix == ".phn":
                phones = phones or from_timit(text, sample_rate=sample_rate)
            elif suffix == ".wrd":
                words = words or from_timit(text, sample_rate=sample_rate)
            elif suffix == ".ctm":
                phones = phones or from_ctm(text, name=name)
            elif suffix == ".words.ctm":
                words = words or from_ctm(text, name=name)
            else:
                tiers = from_textgrid(text)
                phones = phones or _tier(tiers, "phone", unnamed=SILENCE)
                words = words or _tier(tiers, "word", unnamed=None)
        except ValueError as error:
            raise ValueError(f"{name}{suffix}: {error}") from error
    return Aligned(phones, words)


def from_timit(text: str, *, sample_rate: int) -> Intervals:
    rows = []
    for number, fields in _lines(text):
        if len(fields) < 3 or not (fields[0].isdigit() and fields[1].isdigit()):
            raise ValueError(f"line {number} is not 'first_sample last_sample name'")
        start, stop = int(fields[0]) / sample_rate, int(fields[1]) / sample_rate
        rows.append((start, stop, fields[2]))
    return _intervals(rows)


def from_ctm(text: str, *, name: str) -> Intervals:
    """The lines whose recording is `name`, or all of them when there is only one recording."""
    rows, recordings = [], set()
    for number, fields in _lines(text):
        if fields[0].startswith(";;"):
            continue
        try:
            recording, _, start, duration, label = fields[:5]
            rows.append((recording, float(start), float(start) + float(duration), label))
        except ValueError as error:
            raise ValueError(
                f"line {number} is not 'recording channel start duration name'"
            ) from error
        recordings.add(recording)
    if len(recordings) > 1:
        rows = [row for row in rows if row[0] == name]
        if not rows:
            raise ValueError(f"{len(recordings)} recordings, none of them {name!r}")
    return _intervals(row[1:] for row in rows)


def from_textgrid(text: str) -> dict[str, Intervals]:
    """Every interval tier by name, intervals without a name included as "".

    The long and the short form hold the same numbers and strings in the same order, so only these
    are looked at. https://www.fon.hum.uva.nl/praat/manual/TextGrid_file_formats.html
    """
    # A string (quotes doubled within), an index like [3]: to drop, the flag, a number of its own.
    pattern = r'"(?:[^"]|"")*"|\[\d*\]|<exists>|(?<![\w.])[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?'
    tokens = iter(t for t in re.findall(pattern, text) if t[0] not in "[<")
    tiers = {}
    try:
        if not next(tokens).startswith('"ooTextFile') or next(tokens) != '"TextGrid"':
            raise ValueError("not a TextGrid")
        _, _, num_tiers = float(next(tokens)), float(next(tokens)), int(next(tokens))
        for _ in range(num_tiers):
            kind, name = next(tokens), _string(next(tokens))
            _, _, size = float(next(tokens)), float(next(tokens)), int(next(tokens))
            if kind == '"IntervalTier"':
                rows = [
                    (float(next(tokens)), float(next(tokens)), _string(next(tokens)))
                    for _ in range(size)
                ]
                tiers[name] = _intervals(rows)
            else:  # points
                for _ in range(2 * size):
                    next(tokens)
    except StopIteration:
        raise ValueError("the TextGrid ends early") from None
    return tiers


def check(intervals: Intervals, num_samples: int) -> None:
    """Raises ValueError where the times cannot belong to audio of `num_samples`."""
    if len(intervals.names) == 0:
        return
    if (intervals.stops < intervals.starts).any() or (np.diff(intervals.starts) < 0).any():
        raise ValueError("times that run backwards")
    end = int(intervals.stops[-1])
    if end > num_samples * (1 + MAX_OVERHANG):
        raise ValueError(
            f"times up to {end / frames.SAMPLE_RATE:.2f} s for "
            f"{num_samples / frames.SAMPLE_RATE:.2f} s of audio; of another sample rate?"
        )


def clip(intervals: Intervals, start: int, stop: int) -> Intervals:
    """What lies in samples [start, stop), counted from `start`."""
    starts = np.clip(intervals.starts, start, stop) - start
    stops = np.clip(intervals.stops, start, stop) - start
    kept = np.flatnonzero(stops > starts)
    return Intervals(starts[kept], stops[kept], tuple(intervals.names[n] for n in kept))


class Packed:
    """Intervals of utterances 0, 1, ..., from the arrays that `pack` or `merge` gave."""

    KINDS: ClassVar[dict[str, str]] = {
        "offsets": "i", "starts": "i", "stops": "i", "codes": "i", "names": "U",
    }  # fmt: skip

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.offsets: np.ndarray = arrays["offsets"]  # U + 1: an utterance's first interval
        self.starts: np.ndarray = arrays["starts"]
        self.stops: np.ndarray = arrays["stops"]
        self.codes: np.ndarray = arrays["codes"]  # N, positions in names
        self.names: list[str] = arrays["names"].tolist()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_aligned(self) -> int:
        """Utterances that have intervals."""
        return int(np.count_nonzero(np.diff(self.offsets)))

    def __getitem__(self, position: int) -> Intervals | None:
        rows = slice(self.offsets[position], self.offsets[position + 1])
        if rows.start == rows.stop:
            return None
        names = tuple(self.names[code] for code in self.codes[rows])
        return Intervals(self.starts[rows], self.stops[rows], names)


def pack(utterances: Sequence[Intervals | None]) -> dict[str, np.ndarray]:
    """Arrays for `Packed`; an utterance without intervals is one with None."""
    lengths = [0 if intervals is None else len(intervals.names) for intervals in utterances]
    known = [intervals for intervals in utterances if intervals is not None]
    labels = [name for intervals in known for name in intervals.names]
    names, codes = np.unique(np.array(labels, dtype=np.str_), return_inverse=True)
    nothing = [np.zeros(0, np.int64)]
    return {
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        "starts": np.concatenate(nothing + [intervals.starts for intervals in known]),
        "stops": np.concatenate(nothing + [intervals.stops for intervals in known]),
        "codes": codes.astype(np.int32),
        "names": names,
    }


def merge(parts: Sequence[Packed]) -> dict[str, np.ndarray]:
    """The arrays of all parts' utterances, one part after the other."""
    names = sorted({name for part in parts for name in part.names})
    code_of = {name: code for code, name in enumerate(names)}
    codes = [
        np.array([code_of[name] for name in part.names], np.int32)[part.codes] for part in parts
    ]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "starts": np.concatenate([part.starts for part in parts]),
        "stops": np.concatenate([part.stops for part in parts]),
        "codes": np.concatenate(codes),
        "names": np.array(names, dtype=np.str_),
    }


def _tier(tiers: dict[str, Intervals], kind: str, *, unnamed: str | None) -> Intervals | None:
    """The tier "phones" or "phone", "words" or "word", also as "SPEAKER - phones"."""
    wanted = (kind, kind + "s")
    found = [name for name in tiers if name.split(" - ")[-1].strip().lower() in wanted]
    if not found:
        return None
    intervals = tiers[found[0]]
    names = [n.strip() or unnamed for n in intervals.names]
    kept = [n for n, label in enumerate(names) if label]
    labels = tuple(label for label in names if label)
    return Intervals(intervals.starts[kept], intervals.stops[kept], labels)


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.split()


def _intervals(rows: Iterable[tuple[float, float, str]]) -> Intervals:
    """Rows of (start, stop, name), in seconds."""
    rows = list(rows)
    times_N2 = np.array([row[:2] for row in rows], np.float64).reshape(-1, 2)
    samples_N2 = np.rint(times_N2 * frames.SAMPLE_RATE).astype(np.int64)
    return Intervals(samples_N2[:, 0], samples_N2[:, 1], tuple(row[2] for row in rows))


def _string(token: str) -> str:
    if not token.startswith('"'):
        raise ValueError(f"{token} where the TextGrid should have a string")
    return token[1:-1].replace('""', '"')


def _decode(text: bytes) -> str:
    """Praat writes UTF-16 with a mark where UTF-8 was not asked for."""
    is_utf16 = text[:2] in (b"\xff\xfe", b"\xfe\xff")
    return text.decode("utf-16" if is_utf16 else "utf-8-sig")
