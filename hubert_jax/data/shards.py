# SPDX-License-Identifier: Apache-2.0
"""Makes shards: audio files are decoded, checked, cut where they are long, and stored as FLAC.

A shard follows from its part of the plan alone: how many workers there are, and how often they were
interrupted, changes no byte.

Dimensions: S samples (16 kHz).
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
from etils import epath

from hubert_jax.data import alignments, audio
from hubert_jax.data.assembly import Record, ShardWriter
from hubert_jax.data.plan import PlannedShard, Task
from hubert_jax.data.readers import Item, Recording, recordings
from hubert_jax.data.utterance import Utterance, piece_id
from hubert_jax.ops import frames

SILENT_PEAK = 32  # of 32768, -60 dB: nothing but dither or the noise of an open line


class Settings(NamedTuple):
    """What decides, besides the audio, what goes into a shard."""

    min_samples: int
    max_samples: int
    synth: dict[str, Any]  # arguments of synth.SynthConfig


class Outcome(NamedTuple):
    """What became of one audio file."""

    records: list[Record]
    rejected: list[tuple[str, str]]  # id and reason
    sample_rate: int  # of the file, 0 where it could not be read


def make(
    task: Task, folder: epath.Path, settings: Settings, report: Callable[[float], None]
) -> None:
    """Makes the shards of a task that `folder` does not have yet; `report` is told seconds done.

    The demo corpus needs a fresh process, see data/synth.py.
    """
    todo = [shard for shard in task.shards if not is_made(folder, shard)]
    if task.source.kind == "synth":
        _make_synth(todo, folder, settings, report)
        return
    shard_of = {item.path: shard for shard in todo for item in shard.items}
    num_left = {shard.name: len(shard.items) for shard in todo}
    writers: dict[str, ShardWriter] = {}
    items = [item for shard in todo for item in shard.items]
    try:
        for recording in recordings(task.source, items):
            name = shard_of[recording.item.path].name
            if name not in writers:
                writers[name] = ShardWriter(folder, name)
            writers[name].add(*process(recording, settings))
            report(recording.item.num_bytes * task.seconds_per_byte)
            num_left[name] -= 1
            if num_left[name] == 0:
                writers[name].finish()
                del writers[name]
    except BaseException as error:
        for writer in writers.values():
            writer.discard(error)
        raise


def is_made(folder: epath.Path, shard: PlannedShard) -> bool:
    return (folder / f"{shard.name}.npz").exists()


def seconds(task: Task, shard: PlannedShard, settings: Settings) -> float:
    """About how much audio goes into a shard."""
    if task.source.kind == "synth":
        return 60.0 * settings.synth[f"{shard.split}_minutes"]
    return task.seconds_per_byte * sum(item.num_bytes for item in shard.items)


def process(recording: Recording, settings: Settings) -> Outcome:
    """Decodes, checks, cuts and encodes one audio file."""
    item, sample_rate = recording.item, 0
    try:
        with recording.open() as file, _open_sound(file, item) as sound:
            sample_rate = sound.samplerate
            if item.num_samples not in (-1, sound.frames):
                raise audio.Rejected(
                    f"{sound.frames} samples, the manifest says {item.num_samples}"
                )
            beside = recording.beside()
            pieces = _pieces(file, sound, item, settings.max_samples)
        num_samples = sum(piece.num_samples for piece in pieces)
        if num_samples < settings.min_samples:
            raise audio.Rejected(f"too short: {num_samples / frames.SAMPLE_RATE:.3f} s")
        aligned = _aligned(beside, item, sample_rate, num_samples)
    except audio.Rejected as reason:
        return Outcome([], [(item.id, str(reason))], sample_rate)
    except OSError as error:
        return Outcome([], [(item.id, f"unreadable: {error}")], sample_rate)

    text = item.text or _text(beside.get(".txt", b""))
    records, rejected = [], []
    for number, piece in enumerate(pieces):
        id_ = item.id if len(pieces) == 1 else piece_id(item.id, number)
        if piece.peak < SILENT_PEAK:
            rejected.append((id_, f"silent: no sample above {SILENT_PEAK} of 32768"))
            continue
        start, stop = piece.start, piece.start + piece.num_samples
        phones, words = (times and alignments.clip(times, start, stop) for times in aligned)
        if len(pieces) > 1:  # a text cannot be cut without times
            text = " ".join(words.names) if words else ""
        record = Record(
            id_, piece.flac, piece.num_samples, item.speaker, text, piece.digest, phones, words
        )
        records.append(record)
    return Outcome(records, rejected, sample_rate)


class _Piece(NamedTuple):
    start: int  # in the recording, at 16 kHz
    num_samples: int
    peak: int  # the largest absolute 16-bit sample
    digest: bytes
    flac: bytes


def _open_sound(file: BinaryIO, item: Item) -> soundfile.SoundFile:
    if item.num_bytes == 0:
        raise audio.Rejected("empty file")
    return audio.open_file(file)


def _pieces(
    file: BinaryIO, sound: soundfile.SoundFile, item: Item, max_samples: int
) -> list[_Piece]:
    """Every piece is encoded as it comes; a file that is as it should be is only decoded."""
    keep = audio.is_stored_form(sound, item.num_bytes) and sound.frames <= max_samples
    pieces = []
    for start, audio_S in audio.pieces(sound, max_samples):
        if len(audio_S) == 0:
            raise audio.Rejected("empty: no samples")
        pieces.append(_piece(start, audio_S, flac=b"" if keep else audio.encode(audio_S)))
    if keep:
        file.seek(0)
        pieces = [pieces[0]._replace(flac=file.read())]
    return pieces


def _piece(start: int, audio_S: np.ndarray, *, flac: bytes) -> _Piece:
    peak = max(int(audio_S.max()), -int(audio_S.min()))
    digest = hashlib.sha256(audio_S.astype("<i2").tobytes()).digest()
    return _Piece(start, len(audio_S), peak, digest, flac)


def _aligned(
    beside: dict[str, bytes], item: Item, sample_rate: int, num_samples: int
) -> alignments.Aligned:
    name = os.path.splitext(os.path.basename(item.path))[0]
    try:
        aligned = alignments.parse(beside, name=name, sample_rate=sample_rate)
        for times in aligned:
            if times is not None:
                alignments.check(times, num_samples)
    except ValueError as error:
        raise audio.Rejected(f"alignment: {error}") from error
    return aligned


def _text(contents: bytes) -> str:
    """The words of a .txt, on one line, without the two sample numbers TIMIT begins with."""
    words = " ".join(contents.decode("utf-8", errors="replace").split())
    return re.sub(r"^\d+ \d+ (?=\S)", "", words)


def _make_synth(
    todo: Sequence[PlannedShard],
    folder: epath.Path,
    settings: Settings,
    report: Callable[[float], None],
) -> None:
    from hubert_jax.data import synth  # with scipy and espeak, which no other source needs

    writers = {shard.split: ShardWriter(folder, shard.name) for shard in todo}
    try:
        for utterance in synth.utterances(synth.SynthConfig(**settings.synth)):
            num_samples = len(utterance.audio_S)
            if not settings.min_samples <= num_samples <= settings.max_samples:
                raise ValueError(
                    f"corpus.synth makes an utterance of {num_samples / frames.SAMPLE_RATE:.2f} s, "
                    f"outside of corpus.min_seconds and max_seconds; set synth's within these"
                )
            split = utterance.id.split("/")[0]
            if split in writers:
                writers[split].add([_synth_record(utterance)], [], frames.SAMPLE_RATE)
                report(num_samples / frames.SAMPLE_RATE)
        for split in list(writers):
            writers[split].finish()
            del writers[split]
    except BaseException as error:
        for writer in writers.values():
            writer.discard(error)
        raise


def _synth_record(utterance: Utterance) -> Record:
    audio_S = audio.to_int16(utterance.audio_S)
    piece = _piece(0, audio_S, flac=audio.encode(audio_S))
    return Record(
        id=utterance.id,
        audio=piece.flac,
        num_samples=piece.num_samples,
        speaker=utterance.speaker,
        text=utterance.text,
        digest=piece.digest,
        phones=utterance.phones,
        words=utterance.words,
    )
