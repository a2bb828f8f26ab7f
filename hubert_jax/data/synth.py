# SPDX-License-Identifier: Apache-2.0
"""The demo corpus: synthetic English speech of many voices with exact phones, words and speakers.

espeak-ng speaks sentences of a seeded grammar and tells where every phone and word begins; a room,
background noise and a random level make the recordings less clean. Nothing is downloaded.

espeak-ng is GPL-3 and therefore an optional extra: the espeakng-loader package brings the library
and its voices, and this file only calls it through ctypes.

espeak carries state from one utterance to the next: it gives the same samples again only for the
same calls in the same order in a fresh process. So run `utterances` from its beginning in a process
started for it alone (multiprocessing's "spawn"). It also sets the C locale of its process.

Dimensions: S samples (16 kHz) of an utterance, R samples of a room's impulse response.
"""

import ctypes
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import signal

from hubert_jax.data import sentences
from hubert_jax.data.utterance import Intervals, Utterance
from hubert_jax.ops import frames

SILENCE = "sil"

ACCENTS = tuple(
    "en en-US en-GB-scotland en-029 en-GB-x-rp en-US-nyc en-GB-x-gbclan en-GB-x-gbcwmd".split()
)

# espeak's variants that sound like people: no robots, no whispers, and no echoes, which would fill
# the silent closures of the stops. F0 is 70 to 145 Hz, of every third or so 175 to 345 Hz.
VOICES = tuple(
    "Andy Jacky Andrea Mario m3 f1 Lee ed linda m1 Nguyen belinda Denis rob aunty Michael paul "
    "Annie david Alex grandma m4 gustave zac m6 travis m8 ian antonio norbert "
    "m7 quincy shelby Mike Gene2 anika john victor steph".split()
)


@dataclasses.dataclass(frozen=True)
class SynthConfig:
    """How much speech, by whom and how clean; a pair is (lowest, highest) of a uniform draw."""

    train_minutes: float
    validation_minutes: float
    train_voices: int
    validation_voices: int  # no voice of the train split
    accents: tuple[str, ...]  # some of ACCENTS; the voices take turns
    words_per_minute: tuple[float, float]  # of a voice; its utterances vary by a tenth around that
    min_seconds: float  # a sentence that comes out shorter or longer is not used
    max_seconds: float
    reverberation_seconds: tuple[float, float]  # RT60, in which an echo falls by 60 dB; 0: no echo
    direct_to_reverberant_db: tuple[float, float]
    snr_db: tuple[float, float]
    level_db: tuple[float, float]  # RMS of an utterance, relative to full scale
    seed: int

    def __post_init__(self):
        if self.train_voices + self.validation_voices > len(VOICES):
            raise ValueError(
                f"synth: {self.train_voices} train_voices and {self.validation_voices} "
                f"validation_voices share no voice, but there are only {len(VOICES)}: ask for fewer"
            )
        unknown = [accent for accent in self.accents if accent not in ACCENTS]
        if unknown or not self.accents:
            raise ValueError(
                f"synth: accents {list(self.accents)}, unknown are {unknown}; "
                f"name one or more of {', '.join(ACCENTS)}"
            )


def utterances(config: SynthConfig) -> Iterator[Utterance]:
    """Yields the corpus: the train split, then the validation split, one voice after the other.

    Ids are "train/SPEAKER/NUMBER" and "validation/SPEAKER/NUMBER"; the speakers of a split speak
    for equally long. The phones of an utterance cover it from end to end, silence being the phone
    "sil"; its words leave silence out.

    The same samples come again only in a fresh process (see the top of this file). Raises
    ImportError where espeakng-loader is not installed.
    """
    espeak = _Espeak(config.seed)
    splits = (
        ("train", config.train_minutes, VOICES[: config.train_voices]),
        # From the end of the list, so that the validation voices stay when train voices are added.
        (
            "validation",
            config.validation_minutes,
            VOICES[len(VOICES) - config.validation_voices :],
        ),
    )
    for split, (split_name, minutes, voices) in enumerate(splits):
        seconds = 0.0
        for turn, voice in enumerate(voices):
            rng = np.random.default_rng((config.seed, split, turn))
            speaker = _speaker(rng, config, voice, config.accents[turn % len(config.accents)])
            espeak.choose(speaker)
            number = 0
            while seconds < 60.0 * minutes * (turn + 1) / len(voices):
                utterance = _record(rng, config, espeak, speaker)
                yield utterance._replace(id=f"{split_name}/{speaker.name}/{number:04d}")
                seconds += len(utterance.audio_S) / frames.SAMPLE_RATE
                number += 1


class _Speaker(NamedTuple):
    """What an utterance shares with the others of its speaker."""

    name: str
    voice: str  # as espeak knows it: accent and variant
    pitch: int  # 0 to 100, 50 is the variant's own
    pitch_range: int  # 0, monotone, to 100
    words_per_minute: float
    rooms: tuple[np.ndarray, ...]  # impulse responses, R float32 each


def _speaker(rng: np.random.Generator, config: SynthConfig, voice: str, accent: str) -> _Speaker:
    return _Speaker(
        name=f"{voice}-{accent}".lower(),
        voice=f"gmw/{accent}+{voice}",
        pitch=int(rng.integers(40, 61)),
        pitch_range=int(rng.integers(35, 76)),
        words_per_minute=rng.uniform(*config.words_per_minute),
        rooms=tuple(_room(rng, config) for _ in range(4)),
    )


def _record(
    rng: np.random.Generator, config: SynthConfig, espeak: "_Espeak", speaker: _Speaker
) -> Utterance:
    """An utterance of an allowed length, without an id yet."""
    for _ in range(100):
        text = sentences.sentence(rng)
        speech = espeak.speak(text, rate=speaker.words_per_minute * rng.uniform(0.9, 1.1))
        lead, tail = rng.uniform(0.1, 0.4, size=2) * frames.SAMPLE_RATE  # silence around it
        num_samples = int(lead) + _at_16_khz(len(speech.audio)) + int(tail)
        if config.min_seconds <= num_samples / frames.SAMPLE_RATE <= config.max_seconds:
            break
    else:
        raise ValueError(
            f"synth: none of 100 sentences lasted {config.min_seconds} to {config.max_seconds} s; "
            "most last 2 to 7: set min_seconds and max_seconds around that"
        )
    phones, words = _align(speech, lead=int(lead), num_samples=num_samples)
    audio_S = np.zeros(num_samples, np.float32)
    resampled = signal.resample_poly(speech.audio.astype(np.float32), _UP, _DOWN)
    audio_S[int(lead) : int(lead) + len(resampled)] = resampled
    room_R = speaker.rooms[rng.integers(len(speaker.rooms))]
    return Utterance("", _in_room(rng, config, audio_S, room_R), speaker.name, text, phones, words)


# The recording room -------------------------------------------------------------------------------


def _room(rng: np.random.Generator, config: SynthConfig) -> np.ndarray:
    """An impulse response R: the direct sound and, after 2.5 ms, exponentially decaying noise."""
    delay = frames.SAMPLE_RATE // 400
    rt60_samples = rng.uniform(*config.reverberation_seconds) * frames.SAMPLE_RATE
    if rt60_samples <= delay:
        return np.ones(1, np.float32)
    direct_to_reverberant = 10.0 ** (rng.uniform(*config.direct_to_reverberant_db) / 10.0)
    times_R = np.arange(math.ceil(rt60_samples))
    room_R = rng.standard_normal(len(times_R)) * 10.0 ** (-3.0 * times_R / rt60_samples)
    room_R[:delay] = 0.0
    room_R /= math.sqrt(direct_to_reverberant * np.sum(room_R**2))
    room_R[0] = 1.0
    return room_R.astype(np.float32)


def _in_room(
    rng: np.random.Generator, config: SynthConfig, audio_S: np.ndarray, room_R: np.ndarray
) -> np.ndarray:
    """The speech in a room with noise (white to nearly brown), at a level below clipping."""
    num_samples = len(audio_S)
    audio_S = signal.oaconvolve(audio_S, room_R)[:num_samples]
    pole = rng.uniform(0.0, 0.97)
    white_S = rng.standard_normal(num_samples, dtype=np.float32)
    noise_S = signal.lfilter(np.ones(1, np.float32), np.array([1.0, -pole], np.float32), white_S)
    audio_S += noise_S * (
        _rms(audio_S) / _rms(noise_S) * 10.0 ** (-rng.uniform(*config.snr_db) / 20.0)
    )
    gain = 10.0 ** (rng.uniform(*config.level_db) / 20.0) / _rms(audio_S)
    return audio_S * np.float32(min(gain, 0.99 / np.max(np.abs(audio_S))))


def _rms(audio_S: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio_S))))


# Labels -------------------------------------------------------------------------------------------

_ESPEAK_RATE = 22050
_UP = frames.SAMPLE_RATE // math.gcd(frames.SAMPLE_RATE, _ESPEAK_RATE)  # 320
_DOWN = _ESPEAK_RATE // math.gcd(frames.SAMPLE_RATE, _ESPEAK_RATE)  # 441

# Names that serve espeak's rules: it writes both with one IPA symbol, except for a trilled r in
# Scotland, or with none (a short glide, a short schwa).
_SAME_SOUND = {"@2": "@", "@-": "@", "I2": "I", "r-": "r", "t2": "t", ";": "j"}

# How long they sound at the end of a vowel, in espeak's samples: read off spectrograms.
_CODAS = {"l": round(0.090 * _ESPEAK_RATE), "r": round(0.055 * _ESPEAK_RATE)}


class _Phone(NamedTuple):
    start: int  # in espeak's samples
    name: str
    word: int  # position among the words of the utterance


class _Speech(NamedTuple):
    audio: np.ndarray  # int16 at _ESPEAK_RATE
    phones: list[_Phone]
    words: list[str]


def _at_16_khz(position: int) -> int:
    return -(-position * _UP // _DOWN)  # rounded up, as resample_poly does for the length


def _phone_name(mnemonic: str) -> str:
    """espeak's mnemonic without stress ("'eI" is "eI"); its pauses "_" and "_:" are both "sil"."""
    name = mnemonic.lstrip("',%=|")
    return SILENCE if name.startswith("_") else _SAME_SOUND.get(name, name)


def _align(speech: _Speech, *, lead: int, num_samples: int) -> tuple[Intervals, Intervals]:
    """Phones and words in samples of the utterance, in which the speech begins at `lead`."""
    phones = [_Phone(0, SILENCE, -1)]
    phones += [p._replace(start=lead + _at_16_khz(p.start)) for p in _settle(speech)]
    phones += [_Phone(lead + _at_16_khz(len(speech.audio)), SILENCE, -1)]

    # espeak also names phones of no length, and pauses in a row.
    lasting = [p for p, after in itertools.pairwise(phones) if p.start < after.start] + phones[-1:]
    merged = lasting[:1] + [
        p
        for before, p in itertools.pairwise(lasting)
        if (before.name, p.name) != (SILENCE, SILENCE)
    ]
    starts = np.array([phone.start for phone in merged], np.int64)
    stops = np.append(starts[1:], num_samples)
    spoken = np.array([-1 if phone.name == SILENCE else phone.word for phone in merged])
    word_starts = [starts[spoken == word].min() for word in range(len(speech.words))]
    word_stops = [stops[spoken == word].max() for word in range(len(speech.words))]
    return (
        Intervals(starts, stops, tuple(phone.name for phone in merged)),
        Intervals(
            np.array(word_starts, np.int64), np.array(word_stops, np.int64), tuple(speech.words)
        ),
    )


def _settle(speech: _Speech) -> list[_Phone]:
    """The phones with their beginnings moved to where espeak's own would mislead.

    It marks a voiceless stop at its release, and the closure, 45 to 55 ms of digital silence, lies
    in the phone before: a silent end of a phone is handed to the next. And it speaks l, in Scotland
    also r, after a vowel as the vowel's end, then names it with no sound left: it gets that end.
    """
    loud = np.flatnonzero(speech.audio)
    stops = [phone.start for phone in speech.phones[1:]] + [len(speech.audio)]
    num_loud = np.searchsorted(loud, stops)
    last_loud = np.where(num_loud > 0, loud[num_loud - 1], -1)

    settled: list[_Phone] = []
    silent_from = 0  # where the sound of the phone before ends
    for phone, last in zip(speech.phones, last_loud, strict=True):
        start = phone.start
        if settled and SILENCE not in (settled[-1].name, phone.name):
            if settled[-1].name != "?":  # a glottal stop is silent as a whole
                start = silent_from
            if phone.name in _CODAS and last < phone.start:
                start -= min(_CODAS[phone.name], (start - settled[-1].start) // 2)
        settled.append(phone._replace(start=start))
        silent_from = max(int(last) + 1, phone.start)
    return settled


# espeak-ng ----------------------------------------------------------------------------------------

# From espeak-ng's speak_lib.h.
_BUFFER_MS = 2000  # audio for each call of the callback
_SYNCHRONOUS, _PHONEME_EVENTS, _DO_NOT_EXIT = 2, 0x0001, 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_WORD_EVENT, _PHONEME_EVENT = 1, 7


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("message", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("text_length", ctypes.c_int),  # of a word, in characters
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Espeak:
    """The espeak-ng library of this process."""

    def __init__(self, seed: int):
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                "synthetic speech needs espeakng-loader: pip install hubert_jax[demo]"
            ) from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        path = espeakng_loader.get_data_path()
        rate = self._library.espeak_Initialize(
            _SYNCHRONOUS, _BUFFER_MS, os.fsencode(path), _PHONEME_EVENTS | _DO_NOT_EXIT
        )
        if rate != _ESPEAK_RATE:
            raise RuntimeError(
                f"espeak cannot read its data in {path}: the path has {len(os.fsencode(path))} "
                "bytes, and it takes about 160; install espeakng-loader again, under a shorter path"
            )
        # Breath is noise, which espeak otherwise seeds with the time of day.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._callback = _Callback(self._receive)  # kept: the library holds only its address
        self._library.espeak_SetSynthCallback(self._callback)
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, int, int, str]] = []

    def choose(self, speaker: _Speaker) -> None:
        if self._library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise ValueError(f"espeak has no voice {speaker.voice}; update espeakng-loader")
        self._library.espeak_SetParameter(_VOLUME, 25, 0)  # the loudest voices clip at 50
        self._library.espeak_SetParameter(_PITCH, speaker.pitch, 0)
        self._library.espeak_SetParameter(_RANGE, speaker.pitch_range, 0)

    def speak(self, text: str, *, rate: float) -> _Speech:
        self._chunks.clear()
        self._events.clear()
        self._library.espeak_SetParameter(_RATE, round(rate), 0)
        encoded = text.encode("ascii") + b"\0"
        error = self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded)), 0, 0, 0, 0, None, None
        )
        if error:
            raise RuntimeError(f"espeak_Synth returned {error} for {text!r}")
        phones: list[_Phone] = []
        begins: list[int] = []  # of the words in the text
        for kind, sample, position, name in self._events:
            if kind == _WORD_EVENT:
                begins.append(position - 1)
            elif kind == _PHONEME_EVENT:
                phones.append(_Phone(sample, _phone_name(name), len(begins) - 1))
        # Up to the next one's beginning: espeak speaks some pairs ("there was") as one word.
        words = [text[a:b].strip(" ,") for a, b in itertools.pairwise([*begins, len(text)])]
        return _Speech(np.concatenate(self._chunks), phones, words)

    def _receive(self, audio, num_samples, events) -> int:
        if audio and num_samples:
            self._chunks.append(np.ctypeslib.as_array(audio, (num_samples,)).copy())
        for event in events:
            if event.type == 0:  # the end of the list
                break
            name = event.name.decode("ascii", "replace")
            self._events.append((event.type, event.sample, event.text_position, name))
        return 0
