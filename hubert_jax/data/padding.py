# SPDX-License-Identifier: Apache-2.0
"""Whole utterances in batches of a few padded lengths, for extraction; training pads nothing.

N utterances, R rungs (padded lengths, shortest first)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hubert_jax.data import rungs
from hubert_jax.ops import frames

MAX_RUNGS = 6
RUNG_SECONDS = 600.0  # of audio, whose computation takes about as long as compiling one more rung


class Batch(NamedTuple):
    members: np.ndarray  # indices into the lengths that were given
    num_rows: int  # those that are too many are filled with silence
    num_samples: int  # padded


def plan(num_samples_N: np.ndarray, rungs_R: np.ndarray, rows: Callable[[int], int]) -> list[Batch]:
    """Every utterance once, the longest first, so that only the last batch is not full."""
    order = np.argsort(-num_samples_N, kind="stable")
    planned, first = [], 0
    while first < len(order):
        rung = int(rungs_R[np.searchsorted(rungs_R, num_samples_N[order[first]])])
        num_rows = rows(rung)
        planned.append(Batch(order[first : first + num_rows], num_rows, rung))
        first += num_rows
    return planned


def padded_lengths(num_samples_N: np.ndarray) -> np.ndarray:
    """The few lengths in samples, rising, that cost a corpus least: R, at most MAX_RUNGS.

    Padding up to the next rung is cropping down to it on the line turned around.
    """
    needed_N = np.maximum(num_samples_N, frames.RECEPTIVE_FIELD)
    hops_N = -(-needed_N // frames.HOP)
    longest = hops_N.max()
    ladders = rungs.fit_ladders(longest - hops_N, MAX_RUNGS)
    ladders = [np.sort(longest - ladder_R) for ladder_R in ladders]

    def cost(ladder_R: np.ndarray) -> float:
        padded = ladder_R[np.searchsorted(ladder_R, hops_N)].sum()
        return padded / frames.FRAME_RATE + RUNG_SECONDS * len(ladder_R)

    return min(ladders, key=cost) * frames.HOP
