# SPDX-License-Identifier: Apache-2.0
"""Decoding, resampling, cutting and FLAC."""

import io

import numpy as np
import pytest
import soundfile

from hubert_jax.data import audio
from hubert_jax.ops import frames

RATE = frames.SAMPLE_RATE


def bursts(rng, seconds, *, pauses):
    """Noise with 0.3 s of near silence from every second in `pauses` on; int16."""
    audio_S = rng.normal(0, 3000, round(seconds * RATE)).astype(np.int16)
    for pause in pauses:
        quiet = slice(round(pause * RATE), round((pause + 0.3) * RATE))
        audio_S[quiet] //= 1000
    return audio_S


def file_of(samples, rate, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    file.seek(0)
    return file


def test_pieces_are_the_recording_and_end_in_its_pauses():
    pauses = [1.7, 3.4, 4.9, 6.6, 8.1, 9.2]
    audio_S = bursts(np.random.default_rng(0), 10.7, pauses=pauses)
    pieces = list(audio.cut([audio_S], 2 * RATE))
    starts = np.array([start for start, _ in pieces])
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), audio_S)
    np.testing.assert_array_equal(np.diff(starts), [len(piece) for _, piece in pieces[:-1]])
    assert all(2 * RATE // 3 <= len(piece) <= 2 * RATE for _, piece in pieces)
    from_pause = [min(abs(start / RATE - pause - 0.15) for pause in pauses) for start in starts[1:]]
    assert len(pieces) == 7 and max(from_pause) < 0.06


def test_cuts_do_not_depend_on_the_blocks():
    audio_S = bursts(np.random.default_rng(1), 9.0, pauses=[1.5, 3.1, 6.0])
    whole = [start for start, _ in audio.cut([audio_S], 2 * RATE)]
    for num_blocks in (2, 7, 40):
        blocks = np.array_split(audio_S, num_blocks)
        assert [start for start, _ in audio.cut(blocks, 2 * RATE)] == whole
    other = bursts(np.random.default_rng(1), 9.0, pauses=[1.2, 3.1, 6.0])
    assert [start for start, _ in audio.cut([other], 2 * RATE)] != whole


@pytest.mark.parametrize("num_samples", [0, 100, 2 * RATE])
def test_what_is_short_enough_is_not_cut(num_samples):
    audio_S = np.arange(num_samples, dtype=np.int16)
    ((start, piece),) = audio.cut([audio_S], 2 * RATE)
    assert start == 0
    np.testing.assert_array_equal(piece, audio_S)


def test_barely_too_long_is_cut_near_the_middle():
    for excess in (1, RATE // 2, RATE):
        audio_S = np.random.default_rng(0).normal(0, 99, 2 * RATE + excess).astype(np.int16)
        lengths = [len(piece) for _, piece in audio.cut([audio_S], 2 * RATE)]
        assert len(lengths) == 2 and min(lengths) >= 2 * RATE // 3 and max(lengths) <= 2 * RATE


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 48_000])
def test_other_rates_and_channels_become_16_khz_mono(rate, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_SECONDS", 1)  # several blocks
    seconds, frequency = 2.5, 440.0
    tone = 0.4 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    silent_right = np.stack([tone, np.zeros_like(tone)], axis=1)
    sound = audio.open_file(file_of(silent_right, rate, format="WAV", subtype="FLOAT"))
    got_S = np.concatenate(list(audio.blocks(sound)))
    want_S = 0.2 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)
    assert abs(len(got_S) - len(want_S)) <= 1
    middle = slice(RATE // 4, 2 * RATE)
    np.testing.assert_allclose(got_S[middle], want_S[middle], atol=2e-4)  # the filter's ripple


def test_sixteen_bits_survive_and_a_slice_is_a_slice():
    audio_S = np.random.default_rng(0).integers(-32768, 32768, RATE).astype(np.int16)
    flac = audio.encode(audio_S)
    sound = audio.open_file(io.BytesIO(flac))
    assert audio.is_stored_form(sound, len(flac))
    ((_, piece),) = audio.pieces(sound, RATE)
    np.testing.assert_array_equal(piece, audio_S)
    whole_S = audio.decode(flac)
    np.testing.assert_array_equal(whole_S * 32768, audio_S)
    np.testing.assert_array_equal(audio.decode(flac, 5_000, 9_000), whole_S[5_000:9_000])
    np.testing.assert_array_equal(audio.decode(flac, 15_000), whole_S[15_000:])


def test_only_16_khz_16_bit_mono_flac_is_stored_as_it_is():
    noise = np.random.default_rng(0).normal(0, 0.1, (RATE, 2))
    for samples, rate, options in (
        (noise[:, 0], RATE, dict(format="WAV", subtype="PCM_16")),
        (noise[:, 0], RATE, dict(format="FLAC", subtype="PCM_24")),
        (noise[:, 0], 8_000, dict(format="FLAC", subtype="PCM_16")),
        (noise, RATE, dict(format="FLAC", subtype="PCM_16")),
    ):
        file = file_of(samples, rate, **options)
        assert not audio.is_stored_form(audio.open_file(file), len(file.getvalue()))
    file = file_of(noise[:, 0], RATE, format="FLAC", subtype="PCM_16")
    assert not audio.is_stored_form(audio.open_file(file), 10 * len(file.getvalue()))  # a cover


def test_unreadable_audio_says_why():
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE)
    with pytest.raises(audio.Rejected, match="unreadable: Format not recognised"):
        audio.open_file(io.BytesIO(b"not audio" * 100))
    flac = file_of(noise, RATE, format="FLAC").getvalue()
    with pytest.raises(audio.Rejected, match=r"unreadable|ends early"):
        list(audio.blocks(audio.open_file(io.BytesIO(flac[: len(flac) // 2]))))
    nan = file_of(np.full(RATE, np.nan), RATE, format="WAV", subtype="FLOAT")
    with pytest.raises(audio.Rejected, match="not numbers"):
        list(audio.blocks(audio.open_file(nan)))
