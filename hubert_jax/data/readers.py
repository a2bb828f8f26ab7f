# SPDX-License-Identifier: Apache-2.0
"""Where audio comes from: folders, LibriSpeech trees and archives, fairseq manifests.

A source is written `kind:path` in a config, several of them with commas between:

    folder:PATH or PATH  every audio file below it; .txt, .phn, .wrd, .TextGrid, .ctm beside a file
                         are its text and times
    librispeech:PATH     a tree as LibriSpeech lays it out, one of its .tar.gz archives, or a folder
                         of such archives; archives are read in one pass and never unpacked
    tsv:PATH             a fairseq manifest: the root, then "path<TAB>samples" lines
    synth                the demo corpus (data/synth.py), made here rather than read

Reading has two steps: `listing` says what there is, `recordings` opens it. An utterance's id is its
path below the source's root, without the extension.
"""

import io
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile

from hubert_jax.data import alignments, archives, audio, fairseq_files
from hubert_jax.data.utterance import id_of

KINDS = ("folder", "librispeech", "tsv", "synth")
BESIDE = (*alignments.SUFFIXES, ".txt")
LIBRISPEECH_NAME = re.compile(r"(\d+)-(\d+)-\d+")  # speaker-chapter-utterance
NUM_PROBED = 50  # files whose headers are read, to know about how much audio there is


class Source(NamedTuple):
    kind: str
    path: str

    @property
    def is_archive(self) -> bool:
        return self.kind == "librispeech" and self.path.endswith(archives.SUFFIXES)

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" if self.path else self.kind


class Item(NamedTuple):
    """One audio file of a source."""

    id: str
    path: str  # the file's own; within an archive, the member's
    num_bytes: int
    speaker: str
    text: str
    beside: tuple[str, ...]  # endings of files of the same name, as they are written
    num_samples: int  # that the manifest promises, at the file's rate; -1 where nothing does


class Listing(NamedTuple):
    items: list[Item]
    seconds_per_byte: float  # about, for the bar


class Recording(NamedTuple):
    """An audio file about to be read; its methods raise OSError when it cannot be."""

    item: Item
    data: bytes | None  # of an archive's member

    def open(self) -> BinaryIO:
        return open(self.item.path, "rb") if self.data is None else io.BytesIO(self.data)

    def beside(self) -> dict[str, bytes]:
        """Contents of the files of the same name, by their ending in lower case."""
        stem = os.path.splitext(self.item.path)[0]
        endings = self.item.beside
        return {ending.lower(): pathlib.Path(stem + ending).read_bytes() for ending in endings}


def parse(specification: str) -> list[Source]:
    """Sources of a config field. Raises ValueError, FileNotFoundError."""
    sources: list[Source] = []
    for part in filter(None, (part.strip() for part in specification.split(","))):
        kind, colon, path = part.partition(":")
        if part == "synth":
            source = Source("synth", "")
        elif colon and kind in KINDS:
            source = Source(kind, os.path.expanduser(path))
        else:  # a bare path
            source = Source("folder", os.path.expanduser(part))
        if source.kind == "synth" and source.path:
            raise ValueError(f"source {part!r}: synth takes no path, it is made from corpus.synth")
        if source.kind != "synth" and not os.path.exists(source.path):
            raise FileNotFoundError(
                f"source {part!r}: {os.path.abspath(source.path)} does not exist; a source is a "
                f"folder or 'kind:path' with kind one of {', '.join(KINDS)}"
            )
        sources += _archives_within(source)
    return sources


def _archives_within(source: Source) -> list[Source]:
    """A folder of LibriSpeech archives is as many sources as archives."""
    if source.kind != "librispeech" or not os.path.isdir(source.path):
        return [source]
    names = sorted(name for name in os.listdir(source.path) if name.endswith(archives.SUFFIXES))
    return [Source(source.kind, os.path.join(source.path, name)) for name in names] or [source]


def listing(
    source: Source, *, speaker_pattern: str, report: Callable[[float], None] = lambda _: None
) -> Listing:
    """Everything in a source, sorted by id (archives: in their order).

    `report` is told the compressed bytes read of an archive: listing one takes a pass over it.
    Raises ValueError where there is nothing, or where something points out of the source.
    """
    if source.is_archive:
        found = _list_archive(source, report)
    elif source.kind == "tsv":
        found = _probed(_list_manifest(source, speaker_pattern))
    elif source.kind == "librispeech":
        found = _probed(_list_librispeech(source))
    else:
        found = _probed(_list_folder(source, speaker_pattern))
    return found


def recordings(source: Source, items: Sequence[Item]) -> Iterator[Recording]:
    """Opens `items` of a source one after the other; of an archive in one pass."""
    if not source.is_archive:
        for item in items:
            yield Recording(item, None)
        return
    wanted = {item.path: item for item in items}
    for member, data in archives.members(source.path, wanted.__contains__):
        yield Recording(wanted.pop(member), data)
        if not wanted:
            return
    if wanted:
        raise ValueError(
            f"{source.path}: {len(wanted)} files that were in it are gone, {next(iter(wanted))} for"
            f" one; the archive was changed while prepare was under way"
        )


def speaker_of(id_: str, pattern: str) -> str:
    """Who speaks, as far as the id tells.

    The first group of the regular expression `pattern` if there is one. Without: the first number
    of a LibriSpeech name; else the first folder; else what is before the first "-" of the name,
    which is the whole name where there is none.
    """
    if pattern:
        match = re.search(pattern, id_)
        if match is None or not match.groups() or not match[1]:
            raise ValueError(
                f"corpus.speaker_pattern {pattern!r} finds no speaker in the id {id_!r}; "
                f"its first group (in parentheses) must"
            )
        return match[1]
    librispeech = LIBRISPEECH_NAME.fullmatch(posixpath.basename(id_))
    if librispeech:
        return librispeech[1]
    folder, slash, _ = id_.partition("/")
    return folder if slash else id_.split("-")[0]


# Folders.


def _list_folder(source: Source, speaker_pattern: str) -> list[Item]:
    items, others = [], set()
    for folder, names in _walk(source.path):
        endings = _beside(names)
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in audio.SUFFIXES:
                others.add(suffix.lower() or name)
                continue
            path = os.path.join(folder, name)
            id_ = id_of(os.path.relpath(path, source.path))
            speaker = speaker_of(id_, speaker_pattern)
            items.append(Item(id_, path, _size(path), speaker, "", endings.get(stem, ()), -1))
    if not items:
        raise ValueError(
            f"{os.path.abspath(source.path)}: no audio below it; looked for "
            f"{' '.join(sorted(audio.SUFFIXES))}, found "
            f"{' '.join(sorted(others)[:10]) or 'no file at all'}"
        )
    return sorted(items)


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, its file names) below `root`, links followed once, hidden names left out."""
    if not os.path.isdir(root):
        raise NotADirectoryError(f"{os.path.abspath(root)} is not a folder")

    def fail(error: OSError):
        raise error

    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, sorted(name for name in names if not name.startswith("."))


def _beside(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Endings of text and alignment files in one folder, by the name before the ending."""
    endings: dict[str, tuple[str, ...]] = {}
    for name in names:
        for ending in BESIDE:
            if name.lower().endswith(ending):
                stem, as_written = name[: -len(ending)], name[-len(ending) :]
                endings[stem] = (*endings.get(stem, ()), as_written)
                break
    return endings


# LibriSpeech.


def _list_librispeech(source: Source) -> list[Item]:
    items, texts = [], {}
    for folder, names in _walk(source.path):
        for name in names:
            path = os.path.join(folder, name)
            stem, suffix = os.path.splitext(name)
            match = LIBRISPEECH_NAME.fullmatch(stem)
            if name.endswith(".trans.txt"):
                texts.update(_transcripts(pathlib.Path(path).read_bytes(), path))
            elif match and suffix.lower() in audio.SUFFIXES:
                id_ = id_of(os.path.relpath(path, source.path))
                items.append(Item(id_, path, _size(path), match[1], "", (), -1))
    if not items:
        raise ValueError(
            f"{os.path.abspath(source.path)}: neither SPEAKER-CHAPTER-UTTERANCE.flac nor .tar.gz "
            f"below it; is it LibriSpeech? Other audio is read with folder:{source.path}"
        )
    return sorted(_with_text(items, texts))


def _list_archive(source: Source, report: Callable[[float], None]) -> Listing:
    items: list[Item] = []
    texts: dict[str, str] = {}
    seconds, num_bytes = 0.0, 0
    endings = (".trans.txt", *audio.SUFFIXES)
    for member, data in archives.members(source.path, lambda name: name.endswith(endings), report):
        stem, suffix = posixpath.splitext(posixpath.basename(member))
        match = LIBRISPEECH_NAME.fullmatch(stem)
        if member.endswith(".trans.txt"):
            texts.update(_transcripts(data, f"{source.path}: {member}"))
        elif match and suffix in audio.SUFFIXES:
            if len(items) < NUM_PROBED:
                seconds += _seconds(io.BytesIO(data))
                num_bytes += len(data)
            id_ = id_of(posixpath.normpath(member).removeprefix("LibriSpeech/"))
            items.append(Item(id_, member, len(data), match[1], "", (), -1))
    if not items:
        raise ValueError(
            f"{source.path}: no SPEAKER-CHAPTER-UTTERANCE.flac in it; is it a LibriSpeech archive? "
            f"Unpack others and read them with folder:PATH"
        )
    return Listing(_with_text(items, texts), seconds / max(num_bytes, 1))


def _transcripts(text: bytes, path: str) -> dict[str, str]:
    """UTTERANCE -> WORDS from the "UTTERANCE WORDS" lines of a chapter."""
    try:
        lines = text.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    return {name: words for name, _, words in (line.partition(" ") for line in lines) if name}


def _with_text(items: list[Item], texts: dict[str, str]) -> list[Item]:
    return [item._replace(text=texts.get(posixpath.basename(item.id), "")) for item in items]


# fairseq manifests.


def _list_manifest(source: Source, speaker_pattern: str) -> list[Item]:
    root, rows = fairseq_files.read_manifest(source.path)
    if not rows:
        raise ValueError(f"{source.path}: a manifest of no audio, only its root {root}")
    items = []
    for path, num_samples in rows:
        id_, full = id_of(path), os.path.join(root, path)
        speaker = speaker_of(id_, speaker_pattern)
        items.append(Item(id_, full, _size(full), speaker, "", (), num_samples))
    return sorted(items)


# What they share.


def _size(path: str) -> int:
    """Bytes of a file; 0 of one that is not there, which reading it will report."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _probed(items: list[Item]) -> Listing:
    """A listing with the seconds per byte of some of its files."""
    seconds, num_bytes = 0.0, 0
    for n in np.linspace(0, len(items) - 1, min(NUM_PROBED, len(items))).astype(int):
        try:
            with open(items[n].path, "rb") as file:  # soundfile knows UTF-8 names only
                found = _seconds(file)
        except OSError:  # read later, and rejected with the reason
            found = 0.0
        if found:
            seconds += found
            num_bytes += items[n].num_bytes
    return Listing(items, seconds / max(num_bytes, 1))


def _seconds(file: BinaryIO) -> float:
    try:
        return soundfile.info(file).duration
    except (soundfile.SoundFileError, OSError):
        return 0.0
