# SPDX-License-Identifier: Apache-2.0
"""The demo corpus is what its labels and its config say, and the same every time.

Dimensions: S samples, R samples of a room's impulse response.
"""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from hubert_jax.data import synth
from hubert_jax.ops import frames

pytest.importorskip("espeakng_loader")

MILLISECOND = frames.SAMPLE_RATE // 1000
CONFIG = synth.SynthConfig(
    train_minutes=3.0,
    validation_minutes=0.5,
    train_voices=8,
    validation_voices=2,
    accents=("en", "en-US", "en-GB-scotland", "en-029"),
    words_per_minute=(150.0, 200.0),
    min_seconds=2.2,
    max_seconds=8.0,
    reverberation_seconds=(0.15, 0.5),
    direct_to_reverberant_db=(3.0, 12.0),
    snr_db=(10.0, 30.0),
    level_db=(-32.0, -20.0),
    seed=0,
)
DRY = dataclasses.replace(CONFIG, reverberation_seconds=(0.0, 0.0), snr_db=(200.0, 200.0))
VOWELS = set("@ 0 3 3: A: A@ E I O: U V a aI aU aa eI i i: oU u:".split())


@pytest.fixture(scope="module")
def corpus():
    return list(synth.utterances(CONFIG))


@pytest.fixture(scope="module")
def dry():
    return list(synth.utterances(DRY))


def digest_of(config):
    """sha256 over audio, text and times of a corpus, made in a fresh process."""
    code = (
        "import hashlib\n"
        "from hubert_jax.data import synth\n"
        "from hubert_jax.data.synth import SynthConfig\n"
        "digest = hashlib.sha256()\n"
        f"for utterance in synth.utterances({config!r}):\n"
        "    digest.update(utterance.audio_S.tobytes())\n"
        "    digest.update(repr((utterance.id, utterance.text, utterance.phones.names)).encode())\n"
        "    digest.update(utterance.phones.starts.tobytes() + utterance.words.stops.tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return finished.stdout


def test_a_fresh_process_makes_the_same_corpus():
    # The validation voices take in one with breath, whose noise espeak would seed with the clock.
    small = dataclasses.replace(CONFIG, train_minutes=0.5, validation_minutes=0.1, train_voices=3)
    first = digest_of(small)
    assert digest_of(small) == first
    assert digest_of(dataclasses.replace(small, seed=1)) != first


def test_phones_cover_every_utterance(corpus):
    for utterance in corpus:
        starts, stops, names = utterance.phones
        assert starts.dtype == stops.dtype == np.int64
        assert len(starts) == len(stops) == len(names)
        assert starts[0] == 0 and stops[-1] == len(utterance.audio_S)
        np.testing.assert_array_equal(starts[1:], stops[:-1])
        assert np.all(starts < stops)
        assert names[0] == names[-1] == synth.SILENCE
        assert not any("'" in name or "," in name or name.startswith("_") for name in names)


def test_words_are_the_text_and_consist_of_whole_phones(corpus):
    for utterance in corpus:
        starts, stops, names = utterance.words
        assert " ".join(names) == utterance.text.replace(",", "")
        assert np.all(starts < stops) and np.all(stops[:-1] <= starts[1:])
        assert set(starts) <= set(utterance.phones.starts)
        assert set(stops) <= set(utterance.phones.stops)
        spoken = sum(
            stop - start
            for start, stop, name in zip(*utterance.phones, strict=True)
            if name != synth.SILENCE
        )
        assert np.sum(stops - starts) == spoken


def test_every_phone_of_english_occurs(corpus):
    symbols = {name for utterance in corpus for name in utterance.phones.names}
    english = "p b t d k g tS dZ f v T D s z S Z h m n N l r j w"
    assert set(english.split()) <= symbols
    assert symbols >= VOWELS
    assert 45 < len(symbols) < 80


def test_splits_share_no_speaker_and_keep_to_their_lengths(corpus):
    speakers, seconds = {}, {}
    for utterance in corpus:
        split, speaker, _ = utterance.id.split("/")
        assert speaker == utterance.speaker
        length = len(utterance.audio_S) / frames.SAMPLE_RATE
        assert CONFIG.min_seconds <= length <= CONFIG.max_seconds
        speakers.setdefault(split, set()).add(speaker)
        seconds[split] = seconds.get(split, 0.0) + length
    assert len({utterance.id for utterance in corpus}) == len(corpus)
    assert len(speakers["train"]) == 8 and len(speakers["validation"]) == 2
    voices = {split: {name.split("-")[0] for name in names} for split, names in speakers.items()}
    assert not voices["train"] & voices["validation"]
    assert {name.partition("-")[2] for name in speakers["train"]} == {
        accent.lower() for accent in CONFIG.accents
    }
    assert 180.0 <= seconds["train"] < 180.0 + CONFIG.max_seconds
    assert 30.0 <= seconds["validation"] < 30.0 + CONFIG.max_seconds


def test_vowels_are_loud_and_silence_is_silent(dry):
    power = {True: [], False: []}  # of vowels, of silences
    for utterance in dry:
        floor = np.mean(np.square(utterance.audio_S)) * 1e-4
        for start, stop, name in zip(*utterance.phones, strict=True):
            # 2 ms of the resampling filter's ringing on either side are no one's.
            inside = utterance.audio_S[start + 2 * MILLISECOND : stop - 2 * MILLISECOND]
            if name in VOWELS | {synth.SILENCE} and len(inside) > 10 * MILLISECOND:
                power[name in VOWELS].append(np.mean(np.square(inside)) / floor)
    assert np.median(power[True]) > 1e4  # above the mean of the whole utterance
    assert np.quantile(power[True], 0.02) > 100.0 * np.max(power[False])


def test_closures_belong_to_their_stops(dry):
    closures = []
    for utterance in dry:
        quiet_S = np.abs(utterance.audio_S) < 1e-3 * np.max(np.abs(utterance.audio_S))
        starts, stops, names = utterance.phones
        for n in range(1, len(names) - 1):
            if names[n] == synth.SILENCE or stops[n] - starts[n] < 40 * MILLISECOND:
                continue
            assert not np.all(quiet_S[stops[n] - 10 * MILLISECOND : stops[n]]), names[n]
            if names[n] in {"p", "t", "k"} and names[n - 1] in VOWELS:
                begin = starts[n] + 2 * MILLISECOND
                closures.append(np.all(quiet_S[begin : begin + 20 * MILLISECOND]))
    assert len(closures) > 50
    assert np.mean(closures) > 0.95


def test_every_phone_sounds(dry):
    # espeak names the l of "bell" and the r of a Scottish "door" after their sound has passed.
    for utterance in dry:
        loud_S = np.abs(utterance.audio_S) > 1e-3 * np.max(np.abs(utterance.audio_S))
        for start, stop, name in zip(*utterance.phones, strict=True):
            if name not in {synth.SILENCE, "?"}:
                inside = slice(start + 2 * MILLISECOND, stop - 2 * MILLISECOND)
                assert np.any(loud_S[inside]), (utterance.id, name)
    spoken = sum(name in {"l", "@L"} for utterance in dry for name in utterance.phones.names)
    written = sum(utterance.text.replace("ll", "l").count("l") for utterance in dry)
    assert 0.9 * written < spoken <= written  # the l of "could" and "walked" is silent


def test_noise_and_level_are_as_asked():
    wanted = dataclasses.replace(
        DRY, train_minutes=0.3, train_voices=2, snr_db=(20.0, 20.0), level_db=(-30.0, -30.0)
    )
    for utterance in synth.utterances(wanted):
        silence_S = utterance.audio_S[: utterance.phones.stops[0] - 2 * MILLISECOND]
        rms = np.sqrt(np.mean(np.square(utterance.audio_S)))
        np.testing.assert_allclose(20.0 * np.log10(rms), -30.0, atol=1e-3)
        # 0.1 s of nearly brown noise is few independent samples: its power is known to 3 dB.
        assert -24.0 < 20.0 * np.log10(np.sqrt(np.mean(np.square(silence_S))) / rms) < -16.0
        assert utterance.audio_S.dtype == np.float32 and np.max(np.abs(utterance.audio_S)) < 1.0


def test_a_room_decays_as_asked():
    wanted = dataclasses.replace(
        CONFIG, reverberation_seconds=(0.4, 0.4), direct_to_reverberant_db=(6.0, 6.0)
    )
    room_R = synth._room(np.random.default_rng(0), wanted)
    tail_R = room_R[1:]
    np.testing.assert_allclose(room_R[0] ** 2 / np.sum(tail_R**2), 10.0**0.6, rtol=1e-4)
    tenth = frames.SAMPLE_RATE // 10  # 15 dB, each with 1,600 samples: known to a sixth of a dB
    early, late = np.sum(tail_R[tenth : 2 * tenth] ** 2), np.sum(tail_R[2 * tenth : 3 * tenth] ** 2)
    np.testing.assert_allclose(10.0 * np.log10(early / late), 15.0, atol=1.0)


def test_errors_name_the_remedy(monkeypatch):
    with pytest.raises(
        ValueError, match=r"39 train_voices and 2 validation_voices.* ask for fewer"
    ):
        dataclasses.replace(CONFIG, train_voices=39)
    with pytest.raises(ValueError, match=r"unknown are \['fr'\].*en-029"):
        dataclasses.replace(CONFIG, accents=("en", "fr"))
    with pytest.raises(ValueError, match="none of 100 sentences lasted"):
        next(synth.utterances(dataclasses.replace(CONFIG, min_seconds=30.0, max_seconds=40.0)))
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install hubert_jax\[demo\]"):
        next(synth.utterances(CONFIG))
