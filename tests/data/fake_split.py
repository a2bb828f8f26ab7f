# SPDX-License-Identifier: Apache-2.0
"""A corpus of numbers and its labels, for the batch plan and its loading.

Its audio says which sample it is, its labels which label they are, so a crop tells where it came
from.
"""

import dataclasses

import numpy as np

from hubert_jax.data import arrays, batches
from hubert_jax.ops import frames

CONFIG = batches.BatchConfig(
    seconds=4.0,
    min_seconds=0.1,
    max_seconds=1.0,
    num_rungs=3,
    rungs=(),
    row_multiple=1,
    num_workers=0,
    num_threads=2,
    read_ahead=4,
)
NUM_UTTERANCES = 53


def lengths(num_utterances=NUM_UTTERANCES, seed=0):
    """Samples, from 0.05 to 1.4 s: some are dropped, some are longer than the longest rung."""
    return np.random.default_rng(seed).integers(800, 22_400, num_utterances)


class FakeSplit:
    def __init__(self, num_samples):
        self.num_samples = num_samples
        self.ids = [f"utterance{n}" for n in range(len(num_samples))]

    def audio(self, position, start=0, stop=None):
        return np.arange(self.num_samples[position], dtype=np.float32)[start:stop]


def label_store(folder, split, *, rate, offset=0):
    """Label number t of every utterance is t + offset."""
    num_labels = frames.num_frames(split.num_samples, hop=frames.SAMPLE_RATE // rate)

    def produce(positions):
        for position in positions:
            yield position, (np.arange(num_labels[position]) + offset).astype(np.int16)

    arrays.write_store(
        folder,
        ids=split.ids,
        lengths=num_labels,
        width=None,
        dtype=np.int16,
        num_shards=2,
        produce=produce,
        card={"kind": "labels", "made_from": {}, "rate": rate},
    )
    return arrays.Store(folder)


def replace(**changes):
    return dataclasses.replace(CONFIG, **changes)


def make_plan(num_samples=None, config=CONFIG, *, seed=0, row_multiple=2):
    num_samples = lengths() if num_samples is None else num_samples
    return batches.Plan(num_samples, config, seed=seed, row_multiple=row_multiple)


def epoch_of(plan, epoch=0):
    first = epoch * plan.batches_per_epoch
    return [plan[step] for step in range(first, first + plan.batches_per_epoch)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# The plan
