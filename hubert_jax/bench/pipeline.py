# SPDX-License-Identifier: Apache-2.0
"""The input pipeline alone: FLAC in a corpus on one side, batches with labels on the other.

B batch, S samples, N utterances
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from hubert_jax.data import arrays, assembly, audio, batches, cards, corpus
from hubert_jax.ops import frames

# Every twentieth of the lengths of LibriSpeech's train-clean-100 in seconds, read off an utterance
# of each of its 251 speakers.
LIBRISPEECH_SECONDS = (
    1.64, 3.74, 5.26, 8.04, 9.85, 11.30, 12.26, 12.84, 13.32, 13.77, 14.10,
    14.23, 14.43, 14.61, 14.83, 15.06, 15.32, 15.51, 15.82, 16.30, 17.19,
)  # fmt: skip
LIBRISPEECH_UTTERANCES = 28_539
LABELS = "noise/labels"  # below the work folder


class Rate(NamedTuple):
    """What came out of the pipeline once it ran."""

    audio_seconds: float
    seconds: float


def librispeech_lengths(num_utterances: int) -> np.ndarray:
    """Samples of utterances whose lengths are spread as LibriSpeech's are: int64 N."""
    places_N = (np.arange(num_utterances) + 0.5) / num_utterances
    grid = np.linspace(0, 1, len(LIBRISPEECH_SECONDS))
    seconds_N = np.interp(places_N, grid, LIBRISPEECH_SECONDS)
    return np.round(seconds_N * frames.SAMPLE_RATE).astype(np.int64)


def share_left_out(config: batches.BatchConfig) -> float:
    """Of the audio of an epoch of train-clean-100, cropped away or dropped."""
    lengths_N = librispeech_lengths(LIBRISPEECH_UTTERANCES)
    return batches.Plan(lengths_N, config, seed=0, row_multiple=1).share_left_out


def make_work(
    folder: epath.Path, *, utterances: dict[str, int], num_codes: int
) -> tuple[corpus.Split, arrays.Store]:
    """A work folder with a corpus and labels of it, which `hubert pretrain` can train on.

    `utterances` gives their number in each split. The audio is noise that FLAC makes as small as
    LibriSpeech (1.1 bytes a sample), the labels at 50 Hz are arbitrary. Returns those of "train".
    """
    shards = {}
    for number, (name, count) in enumerate(utterances.items()):
        writer = assembly.ShardWriter(folder / "corpus", f"{name}-0")
        for n, num_samples in enumerate(librispeech_lengths(count).tolist()):
            audio_S = noise(num_samples, seed=(number, n))
            digest, flac = hashlib.sha256(audio_S.tobytes()).digest(), audio.encode(audio_S)
            id_ = f"{name}/{n:06d}"
            record = assembly.Record(id_, flac, num_samples, "noise", "", digest, None, None)
            writer.add([record], [], frames.SAMPLE_RATE)
        writer.finish()
        shards[name] = [assembly.Shard(folder / "corpus", f"{name}-0")]
    facts = assembly.assemble(folder / "corpus", shards)
    card = cards.new("corpus", made_from={"noise": utterances}, **facts)
    cards.write(folder / "corpus" / "card.json", card)
    made = corpus.Corpus(folder / "corpus")
    stores = {
        name: write_labels(folder / LABELS / name, made.split(name), card, num_codes=num_codes)
        for name in utterances
    }
    return made.split("train"), stores["train"]


def write_labels(
    folder: epath.Path, split: corpus.Split, card: cards.Card, *, num_codes: int
) -> arrays.Store:
    lengths_N = frames.num_frames(split.num_samples)
    rng = np.random.default_rng(0)
    arrays.write_store(
        folder,
        ids=split.ids,
        lengths=lengths_N,
        width=None,
        dtype="int16",
        num_shards=4,
        produce=lambda positions: (
            (int(n), rng.integers(num_codes, size=int(lengths_N[n]), dtype=np.int16))
            for n in positions
        ),
        card=cards.new(
            "labels", made_from={"noise": num_codes}, corpus=card["fingerprint"],
            codebook="none", num_codes=num_codes, rate=frames.FRAME_RATE,
        ),
    )  # fmt: skip
    return arrays.Store(folder)


def noise(num_samples: int, *, seed: tuple[int, ...]) -> np.ndarray:
    """A tenth of a second each of eight sounds, noises of unlike colours, in random order: int16 S.

    Something to learn for a training that only has to show that its loss falls.
    """
    rng = np.random.default_rng(seed)
    length = frames.SAMPLE_RATE // 10
    white_IS = rng.standard_normal((-(-num_samples // length), length), np.float32)
    kinds_I = rng.integers(8, size=len(white_IS))
    frequencies = np.fft.rfftfreq(length, 1 / frames.SAMPLE_RATE)
    low = 300 * 1.3 ** np.arange(8)[:, None]
    colours = 1 / (1 + (frequencies / low) ** 2) + 0.3 / (1 + ((frequencies - 4 * low) / 150) ** 2)
    wave_IS = np.fft.irfft(np.fft.rfft(white_IS) * colours[kinds_I], length)
    wave_IS *= (0.008 * 1.25**kinds_I / wave_IS.std(axis=1))[:, None]
    return audio.to_int16(wave_IS.reshape(-1)[:num_samples])


def rates(
    split: corpus.Split,
    labels: Sequence[arrays.Store],
    config: batches.BatchConfig,
    *,
    seconds: float,
    num_threads: int,
    rounds: int,
    normalize: bool,
) -> Iterator[Rate]:
    """The stream of batches as training reads it, by threads; a rate for each of `rounds`.

    Batches are of `seconds` of audio with the rungs of `config`. Reading begins before the clock
    does, and as much is loaded ahead when it stops.
    """
    config = dataclasses.replace(
        config, seconds=max(seconds, config.max_seconds), row_multiple=1,
        num_workers=0, num_threads=num_threads, read_ahead=2,
    )  # fmt: skip
    plan = batches.Plan(split.num_samples, config, seed=0, row_multiple=1)
    endless: Any = batches.stream(
        split, labels, plan, config, first_step=0, num_steps=2**31 - 1, normalize=normalize
    )
    try:
        for _ in range(2 * config.read_ahead):
            next(endless)
        for _ in range(rounds):
            num_samples, started = 0, time.perf_counter()
            for _ in range(plan.batches_per_epoch):
                _, batch = next(endless)
                num_samples += batch["audio"].size
            yield Rate(num_samples / frames.SAMPLE_RATE, time.perf_counter() - started)
    finally:
        endless.close()
