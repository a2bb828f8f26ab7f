# SPDX-License-Identifier: Apache-2.0
"""Decoding, resampling, cutting and FLAC."""

import io
import pathlib
import subprocess
import sys

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


@pytest.mark.parametrize(
    ("subtype", "step"),
    [("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-15), ("PCM_32", 2**-15),
     ("FLOAT", 2**-15), ("DOUBLE", 2**-15), ("ULAW", 2**-4), ("ALAW", 2**-4)],
)  # fmt: skip
def test_samples_of_any_width_become_sixteen_bits(subtype, step):
    audio_S = np.random.default_rng(0).uniform(-0.9, 0.9, RATE)
    sound = audio.open_file(file_of(audio_S, RATE, format="WAV", subtype=subtype))
    ((_, piece),) = audio.pieces(sound, RATE)
    assert piece.dtype == np.int16
    np.testing.assert_allclose(piece / 32768, audio_S, atol=step)


def test_what_is_louder_than_sixteen_bits_is_clipped_and_not_folded():
    loud = np.linspace(-3, 3, 601)
    got = audio.to_int16(loud)
    np.testing.assert_array_equal(got[loud >= 1], 32767)
    np.testing.assert_array_equal(got[loud <= -1], -32768)
    assert (np.diff(got.astype(int)) >= 0).all()


def test_six_channels_are_averaged():
    channels = np.random.default_rng(0).normal(0, 0.1, (RATE, 6))
    sound = audio.open_file(file_of(channels, RATE, format="WAV", subtype="FLOAT"))
    (got_S,) = audio.blocks(sound)
    np.testing.assert_allclose(got_S, channels.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *[(name, "PCM_16") for name in ("WAV", "AIFF", "AU", "W64", "RF64", "CAF", "NIST", "FLAC")],
        ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
    ],
)  # fmt: skip
def test_a_file_that_is_cut_short_is_rejected(container, subtype):
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE)
    whole = file_of(noise, RATE, format=container, subtype=subtype).getvalue()
    assert sum(map(len, audio.blocks(audio.open_file(io.BytesIO(whole))))) == 4 * RATE
    for missing in (300, 1000, len(whole) // 2):
        cut = io.BytesIO(whole[:-missing])
        with pytest.raises(audio.Rejected, match=r"ends early: |unreadable: "):
            list(audio.blocks(audio.open_file(cut)))


@pytest.mark.parametrize("container", ["WAV", "AIFF", "AU", "W64"])
def test_a_header_may_count_itself_in(container):
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE)
    whole = file_of(noise, RATE, format=container, subtype="PCM_16").getvalue()
    audio.open_file(io.BytesIO(whole[:-78]))  # what ffmpeg's is long


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize("more", [0, 1, 20, 47, 300])
def test_an_mp3_with_its_length_is_read_whole(rate, more):
    """The last frame may be padding alone, which is not read."""
    frame = 1152 if rate > RATE else 576
    noise = np.random.default_rng(0).normal(0, 0.1, 40 * frame + more)
    mp3 = file_of(noise, rate, format="MP3").getvalue()
    ape = b"APETAGEX" + bytes(1000)
    for content in (mp3, mp3 + ape, b"ID3\x04\0\0\0\0\x0f\x76" + bytes(2038) + mp3):
        found = audio.open_file(io.BytesIO(content))
        num_samples = sum(map(len, audio.blocks(found)))
        assert abs(num_samples - len(noise) * RATE / rate) <= 1


def test_what_follows_an_ogg_stream_may_be_a_tag_and_no_other_stream():
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE)
    ogg = file_of(noise, RATE, format="OGG", subtype="VORBIS").getvalue()
    tagged = audio.open_file(io.BytesIO(ogg + b"TAG" + bytes(125)))
    assert sum(map(len, audio.blocks(tagged))) == 4 * RATE
    other = file_of(noise[:RATE], RATE, format="OGG", subtype="VORBIS").getvalue()
    with pytest.raises(audio.Rejected, match=r"more than one stream.*, after 4\.0 s"):
        audio.open_file(io.BytesIO(ogg + other))
    for missing in range(1, 4000, 97):
        with pytest.raises(audio.Rejected, match="ends early"):
            audio.open_file(io.BytesIO(ogg[:-missing]))


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_an_mp3_whose_length_is_a_guess_is_read_whole_or_rejected(rate):
    """Without the Xing or Info header, which is its first frame; tags say nothing."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, 20 * rate) * np.repeat(random.random(200), rate // 10)
    for mode, is_read in (("CONSTANT", True), ("VARIABLE", False)):
        mp3 = file_of(
            noise, rate, format="MP3", bitrate_mode=mode, compression_level=0.5
        ).getvalue()
        headless = mp3[mp3.index(mp3[:2], 200) :]
        id3 = b"ID3\x04\0\0\0\0\x0f\x76" + bytes(2038)
        for content in (headless, headless + b"TAG" + bytes(125), id3 + headless):
            sound = audio.open_file(io.BytesIO(content))
            if is_read:
                assert sum(map(len, audio.blocks(sound))) >= 20 * RATE
                continue
            with pytest.raises(audio.Rejected, match="says no length: there is more after"):
                list(audio.blocks(sound))
        whole = audio.open_file(io.BytesIO(mp3 + b"TAG" + bytes(125)))
        assert sum(map(len, audio.blocks(whole))) == 20 * RATE


def test_a_stream_of_unknown_length_is_read_as_long_as_it_is():
    """As sox and ffmpeg write into a pipe."""
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    wav = bytearray(file_of(noise, RATE, format="WAV", subtype="PCM_16").getvalue())
    data = wav.index(b"data") + 4
    for size in (2**31 - 1, 2**32 - 1, 2**31 - 37):
        wav[4:8] = wav[data : data + 4] = size.to_bytes(4, "little")
        (got_S,) = audio.blocks(audio.open_file(io.BytesIO(bytes(wav))))
        assert len(got_S) == RATE


MEASURED = """
import resource, sys
from hubert_jax.data import readers, shards
item = readers.Item("a", sys.argv[1], 1, "a", "", (), -1)
limits = shards.Settings(min_samples=400, max_samples=480_000, synth={})
outcome = shards.process(readers.Recording(item, None), limits)
print(len(outcome.records), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_an_hour_takes_hardly_more_memory_than_a_minute(tmp_path):
    """Beside its FLAC: as float32 an hour is 230 MB, and 720 MB as it is read here."""
    found = {}
    for minutes in (1, 60):
        path = tmp_path / f"{minutes}.wav"
        minute = np.random.default_rng(0).normal(0, 0.01, (60 * 48_000, 1))
        with soundfile.SoundFile(path, "w", 48_000, 1, "PCM_U8") as file:
            for _ in range(minutes):
                file.write(minute)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(path)],
            capture_output=True, check=True, text=True, cwd=pathlib.Path(__file__).parents[2],
        )  # fmt: skip
        found[minutes] = [float(word) for word in done.stdout.split()]
    assert found[60][0] >= 120  # pieces of at most 30 s
    assert found[60][1] - found[1][1] < 120, found  # MB


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
