# SPDX-License-Identifier: Apache-2.0
"""Audio files to pieces of 16 kHz mono, and pieces to FLAC and back.

A recording is decoded and resampled in blocks and cut as it streams by, so that memory does not
grow with its length: an audiobook needs no more of it than a sentence.

Dimensions: S samples (16 kHz), I samples of the file, C channels.
"""

import io
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from hubert_jax.ops import frames

# What libsndfile decodes; .sph and TIMIT's .wav are NIST SPHERE.
SUFFIXES = frozenset(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .au .caf .sph .w64".split())

BLOCK_SECONDS = 60
QUIET_WINDOW = frames.SAMPLE_RATE // 5  # 0.2 s: a pause between words, not a stop's closure
QUIET_STEP = frames.SAMPLE_RATE // 100
MAX_FLAC_OVERHEAD = 2**14  # bytes; libFLAC itself leaves 8 KiB of padding
BLOCK_VALUES = 2**25  # of all channels, in a block; 60 s of stereo at 192 kHz are fewer
MAX_CHANNELS = 64
RATES = (1_000, 1_000_000)  # Hz; what says another rate has a damaged header
# What libsndfile notes of a .wav, .aiff, .au or .w64 that is shorter than its header says.
SIZE_IN_LOG = re.compile(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)")
MAX_MISSING = 128  # bytes; fewer are a writer's carelessness, who counts the header in, say
# What it notes of an .ogg or .opus whose stream has no end, and of one that goes on after it.
CUT_IN_LOG = re.compile(r"Ogg ?: (Last page lacks|File ended unexp)")
JUNK_IN_LOG = re.compile(r"Ogg ?: Junk after the last page")
OGG_HEADER, MAX_OGG_PAGE = 27, 65_307  # bytes
UNKNOWN_SIZE = 2**31 - 2**16  # bytes; who writes into a pipe fills in the largest number there is
UNKNOWN_LENGTH = 2**62  # libsndfile's answer for a stream of unknown length is near 2**63


class Rejected(Exception):
    """Why a recording does not go into the corpus, in words for rejected.tsv."""


def rejected_row(id_: str, reason: str) -> str:
    """A line of rejected.tsv: one line, and UTF-8 whatever a file was called."""
    fields = (text.encode("utf-8", "backslashreplace").decode() for text in (id_, reason))
    return "\t".join(" ".join(field.split()) for field in fields)


def open_file(file: BinaryIO) -> soundfile.SoundFile:
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, OSError) as error:
        raise Rejected(f"unreadable: {_reason(error)}") from error
    reason = _bad_header(sound, file)
    if reason:
        sound.close()
        raise Rejected(reason)
    return sound


def _bad_header(sound: soundfile.SoundFile, file: BinaryIO) -> str:
    """What is wrong with a file by its header and its size; "" where nothing is."""
    if sound.channels > MAX_CHANNELS or not RATES[0] <= sound.samplerate <= RATES[1]:
        return f"unreadable: {sound.channels} channels at {sound.samplerate} Hz"
    for said, found in SIZE_IN_LOG.findall(sound.extra_info):
        is_known = not UNKNOWN_SIZE <= int(said) < 2**32
        if is_known and int(said) - int(found) > MAX_MISSING:
            return f"ends early: {found} of {said} bytes of samples"
    seconds = sound.frames / sound.samplerate
    if CUT_IN_LOG.search(sound.extra_info):
        return f"ends early: after {seconds:.1f} s, without the end of its stream"
    if JUNK_IN_LOG.search(sound.extra_info):
        reason = _after_ogg(file)
        return reason and f"{reason}, after {seconds:.1f} s"
    if sound.format == "NIST":  # of which nothing is noted
        count = re.search(rb"\nsample_count -i (\d+)\s", _part(file, 0, 1024))
        if count and sound.frames < int(count[1]):
            return f"ends early: {sound.frames} of {int(count[1])} samples"
    return ""


def _after_ogg(file: BinaryIO) -> str:
    """What is wrong with an Ogg file after whose stream there is more; "" where it is a tag."""
    tail = _part(file, -MAX_OGG_PAGE, MAX_OGG_PAGE)
    last = tail.rfind(b"OggS")
    page = tail[last:] if last >= 0 else b""
    num_parts = page[OGG_HEADER - 1] if len(page) >= OGG_HEADER else 0
    parts = page[OGG_HEADER : OGG_HEADER + num_parts]
    if page and len(page) < OGG_HEADER + num_parts + sum(parts):
        return "ends early: in the middle of a page"
    is_other = page and page[14:18] != _part(file, 14, 4)  # the number of its stream
    return "more than one stream, of which only the first is read" if is_other else ""


def _part(file: BinaryIO, start: int, size: int) -> bytes:
    """`size` bytes from `start` on, or so many from the end; the file stays where it is."""
    position = file.tell()
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, start if start >= 0 else length + start))
    part = file.read(size)
    file.seek(position)
    return part


def pieces(sound: soundfile.SoundFile, max_samples: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts a recording into (first sample, int16 S) of at most `max_samples` each, at 16 kHz."""
    return cut(map(to_int16, blocks(sound)), max_samples)


def blocks(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Decodes to float32 S blocks at 16 kHz, channels averaged. Raises Rejected.

    soxr's "HQ", which is librosa's default, does the resampling.
    """
    resampler = None
    if sound.samplerate != frames.SAMPLE_RATE:
        resampler = soxr.ResampleStream(
            sound.samplerate, frames.SAMPLE_RATE, num_channels=1, dtype="float32", quality="HQ"
        )
    block = min(BLOCK_SECONDS * sound.samplerate, BLOCK_VALUES // sound.channels)
    num_read, is_last = 0, False
    while not is_last:
        try:
            block_IC = sound.read(block, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError) as error:
            seconds = num_read // sound.samplerate
            raise Rejected(f"unreadable: after {seconds} s or later, {_reason(error)}") from error
        is_last = len(block_IC) < block
        num_read += len(block_IC)
        block_S = block_IC[:, 0] if sound.channels == 1 else block_IC.mean(axis=1)
        if not np.isfinite(block_S).all():
            raise Rejected("samples that are not numbers")
        if resampler is not None:
            block_S = resampler.resample_chunk(block_S, last=is_last)
        yield block_S
    _check_end(sound, num_read)


def _check_end(sound: soundfile.SoundFile, num_read: int) -> None:
    """Raises Rejected where a file that was read to its end has fewer samples than it says.

    An .mp3 says so in a header in its first frame. Without one libsndfile takes that frame's size
    for the size of all, and stops where they would end: right where the bit rate is constant.
    """
    is_early = sound.format == "FLAC" and num_read != sound.frames < UNKNOWN_LENGTH
    if sound.format == "MP3":
        file = sound.name  # as open_file was given it
        if _says_length(file):
            is_early = num_read <= sound.frames - (1152 if sound.samplerate >= 32_000 else 576)
        elif re.match(rb"\xff[\xe0-\xff]", file.read(2)):  # one more frame, and no tag
            raise Rejected(f"says no length: there is more after {num_read} samples")
    if is_early:
        raise Rejected(f"ends early: {num_read} of {sound.frames} samples")


def _says_length(file: BinaryIO) -> bool:
    """Whether an .mp3 has a header of LAME's or Fraunhofer's kind, after a tag in front."""
    tag = _part(file, 0, 10)
    size = sum(byte << shift for byte, shift in zip(tag[6:10], (21, 14, 7, 0), strict=False))
    first = _part(file, 10 + size if tag.startswith(b"ID3") else 0, 256)
    return any(name in first for name in (b"Xing", b"Info", b"VBRI"))


def cut(blocks: Iterable[np.ndarray], max_samples: int) -> Iterator[tuple[int, np.ndarray]]:
    """Joins int16 blocks and cuts where it is quiet: (first sample, S) of <= `max_samples` each.

    No piece of a recording that is cut is shorter than a third of `max_samples`. Where the blocks
    end has no influence on where the cuts are.
    """
    start, held, num_held = 0, [np.zeros(0, np.int16)], 0
    enough = 3 * max_samples // 2  # more than this: what a cut leaves can be cut again
    for block_S in blocks:
        held.append(block_S)
        num_held += len(block_S)
        if num_held <= enough:
            continue
        rest_S = np.concatenate(held)
        while len(rest_S) > enough:
            stop = quietest(rest_S, max_samples // 2, max_samples)
            yield start, rest_S[:stop]
            start, rest_S = start + stop, rest_S[stop:]
        held, num_held = [rest_S], len(rest_S)
    rest_S = np.concatenate(held)
    if len(rest_S) > max_samples:
        low = max(len(rest_S) - max_samples, -(-len(rest_S) // 3))
        stop = quietest(rest_S, low, len(rest_S) - low)
        yield start, rest_S[:stop]
        start, rest_S = start + stop, rest_S[stop:]
    yield start, rest_S


def quietest(audio_S: np.ndarray, low: int, high: int) -> int:
    """The sample in [low, high] around which int16 `audio_S` has least energy; the last of equals.

    "Around" is QUIET_WINDOW; there must be half of it on both sides of low and high.
    """
    half = QUIET_WINDOW // 2
    around = audio_S[low - half : high + half].astype(np.int64)
    energy_before = np.concatenate([[0], np.cumsum(around**2)])
    starts = np.arange(0, high - low + 1, QUIET_STEP)
    energies = energy_before[starts + QUIET_WINDOW] - energy_before[starts]
    return low + int(starts[len(starts) - 1 - np.argmin(energies[::-1])])


def is_stored_form(sound: soundfile.SoundFile, num_bytes: int) -> bool:
    """Whether the file's own bytes can be stored: FLAC, 16 kHz, 16 bits, mono, length known.

    A file that carries much besides (a cover, say) is encoded again.
    """
    form = (sound.format, sound.subtype, sound.samplerate, sound.channels)
    known = 0 < sound.frames < UNKNOWN_LENGTH
    small = num_bytes < 2 * sound.frames + MAX_FLAC_OVERHEAD
    return known and small and form == ("FLAC", "PCM_16", frames.SAMPLE_RATE, 1)


def to_int16(audio_S: np.ndarray) -> np.ndarray:
    """16-bit samples of float [-1, 1]; what came from 16 bits comes back exactly."""
    return np.clip(np.rint(audio_S * 32768.0), -32768, 32767).astype(np.int16)


def encode(audio_S: np.ndarray) -> bytes:
    """FLAC of int16 samples at 16 kHz."""
    file = io.BytesIO()
    soundfile.write(file, audio_S, frames.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode(flac: bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Samples [start, stop) of FLAC bytes as float32 in [-1, 1]; only these are decoded."""
    with soundfile.SoundFile(io.BytesIO(flac)) as sound:
        if start:
            sound.seek(start)
        return sound.read(-1 if stop is None else stop - start, dtype="float32")


def _reason(error: Exception) -> str:
    """The error on one line, without the file's name that soundfile puts before it."""
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return " ".join(text.split())
