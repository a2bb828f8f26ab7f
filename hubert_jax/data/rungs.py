# SPDX-License-Identifier: Apache-2.0
"""The ladder of crop lengths, and how many batches of each rung an epoch has.

N utterances, R rungs (shortest first), V different lengths
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hubert_jax.ops import frames


class Layout(NamedTuple):
    """What every epoch has in common.

    Slots are the rows of all batches one after the other, the longest rung first. The first N slots
    hold the utterances, longest rung first; the last `num_repeats` top the last batch up.
    """

    utterances_N: np.ndarray  # positions in the split of the utterances that are not dropped
    frames_N: np.ndarray  # their lengths
    rung_N: np.ndarray  # the index of the rung below each length
    rungs_R: np.ndarray  # samples
    rows_R: np.ndarray
    first_slots: np.ndarray  # of every batch
    batch_rungs: np.ndarray  # index of every batch's rung
    num_repeats: int
    num_dropped: int
    share_left_out: float  # of the audio: cropped away or dropped


def lay_out(
    num_samples_N: np.ndarray,
    *,
    seconds: float,
    min_seconds: float,
    max_seconds: float,
    num_rungs: int,
    rungs: Sequence[float],
    row_multiple: int,
) -> Layout:
    """The layout for utterances of these lengths; the arguments are those of BatchConfig.

    Rungs are whole numbers of frames, 320 T + 80 samples: 781 frames are 250,000 samples. Of the
    fitted ladders of 1 to `num_rungs` rungs the one that leaves the least audio out is taken: with
    more rungs less is cropped, but more is left of each rung and cropped further.
    """
    shortest, longest = _samples(min_seconds), _samples(max_seconds)
    if not frames.RECEPTIVE_FIELD <= shortest <= longest or num_rungs < 1:
        raise ValueError(
            f"batch.min_seconds {min_seconds}, max_seconds {max_seconds}, num_rungs {num_rungs}:"
            f" have to be at least {frames.RECEPTIVE_FIELD / frames.SAMPLE_RATE:g}, at least"
            " min_seconds, and at least 1"
        )
    given_R = np.array([_samples(rung) for rung in rungs], np.int64)
    if rungs:
        if (np.diff(given_R) <= 0).any() or given_R[0] < shortest or given_R[-1] > longest:
            raise ValueError(
                f"batch.rungs {tuple(rungs)} have to rise, from batch.min_seconds {min_seconds} to"
                f" batch.max_seconds {max_seconds} at most"
            )
        shortest, longest = int(given_R[0]), int(given_R[-1])
    num_samples_N = np.asarray(num_samples_N, np.int64)
    utterances_N = np.flatnonzero(num_samples_N >= shortest)
    if not len(utterances_N):
        raise ValueError(
            f"none of {len(num_samples_N)} utterances has {shortest / frames.SAMPLE_RATE:g} s, the"
            f" longest has {num_samples_N.max(initial=0) / frames.SAMPLE_RATE:g} s; lower"
            " batch.min_seconds"
        )

    frames_N = frames.num_frames(num_samples_N[utterances_N])
    if rungs:
        ladders = [frames.num_frames(given_R)]
    else:
        cropped_N = np.minimum(frames_N, frames.num_frames(longest))
        longest = frames.num_samples(int(cropped_N.max()))
        ladders = fit_ladders(cropped_N, num_rungs)
    if seconds * frames.SAMPLE_RATE < row_multiple * longest:
        longest_s = longest / frames.SAMPLE_RATE
        raise ValueError(
            f"batch.seconds {seconds:g} is too small: rows come in multiples of {row_multiple}"
            f" (devices x accumulation, batch.row_multiple), and {row_multiple} x {longest_s:g} s"
            f" are {row_multiple * longest_s:g} s; raise batch.seconds to that, lower"
            f" batch.max_seconds to {seconds / row_multiple:g}, or use fewer devices"
        )
    layouts = []
    for ladder_R in ladders:
        rungs_R = (ladder_R - 1) * frames.HOP + frames.RECEPTIVE_FIELD
        rows_R = _samples(seconds) // rungs_R // row_multiple * row_multiple
        rung_N = np.searchsorted(ladder_R, frames_N, side="right") - 1
        batches_R, num_repeats = _count_batches(np.bincount(rung_N, minlength=len(rungs_R)), rows_R)
        seen = int((batches_R * rows_R * rungs_R).sum()) - num_repeats * int(rungs_R[0])
        used = batches_R > 0  # a rung without a batch hands everything on: the plan without it
        batch_rungs = np.repeat(np.arange(used.sum()), batches_R[used])[::-1]
        slots = rows_R[used][batch_rungs]
        layouts.append(
            Layout(
                utterances_N=utterances_N,
                frames_N=frames_N,
                rung_N=(np.cumsum(used) - 1)[rung_N],
                rungs_R=rungs_R[used],
                rows_R=rows_R[used],
                first_slots=np.cumsum(slots) - slots,
                batch_rungs=batch_rungs,
                num_repeats=num_repeats,
                num_dropped=len(num_samples_N) - len(utterances_N),
                share_left_out=1 - seen / int(num_samples_N.sum()),
            )
        )
    return min(layouts, key=lambda layout: layout.share_left_out)  # of equals, the fewest rungs


def fit_ladders(frames_N: np.ndarray, num_rungs: int) -> list[np.ndarray]:
    """The ladders of 1, 2, ... `num_rungs` rungs (in frames) that crop the fewest frames away.

    Exact: the best rungs lie at lengths that occur, the first at the shortest, so one dynamic
    programme over the different lengths (683 from 2 to 15.6 s) finds them all.
    """
    lengths_V, counts_V = np.unique(frames_N, return_counts=True)
    num_lengths = len(lengths_V)
    utterances = np.concatenate([[0], np.cumsum(counts_V)])
    frames_below = np.concatenate([[0], np.cumsum(counts_V * lengths_V)])
    # cost[i, j]: frames cropped when the rung lengths_V[i] serves the lengths i to j - 1
    cost = (frames_below - frames_below[:-1, None]) - lengths_V[:, None] * (
        utterances - utterances[:-1, None]
    )
    never = np.iinfo(np.int64).max // 2
    cost[np.tril_indices(num_lengths)] = never
    ladders, best_cuts = [lengths_V[:1]], []
    cropped = cost[0]  # cropped[j]: by the best ladder of so many rungs for the lengths 0 to j - 1
    for _ in range(1, min(num_rungs, num_lengths)):
        candidates = cropped[:-1, None] + cost
        best_cuts.append(candidates.argmin(axis=0))
        cropped = candidates.min(axis=0).clip(max=never)
        cut, rungs = num_lengths, []
        for best_cut in reversed(best_cuts):
            cut = int(best_cut[cut])
            rungs.append(cut)
        ladders.append(lengths_V[[0, *reversed(rungs)]])
    return ladders


def _count_batches(utterances_R: np.ndarray, rows_R: np.ndarray) -> tuple[np.ndarray, int]:
    """Batches of every rung when leftovers move to the next shorter one, and repeats at the end."""
    batches_R, left = np.zeros_like(utterances_R), 0
    for rung in reversed(range(len(rows_R))):
        batches_R[rung], left = divmod(left + int(utterances_R[rung]), int(rows_R[rung]))
    if not left:
        return batches_R, 0
    batches_R[0] += 1
    return batches_R, int(rows_R[0]) - left


def _samples(seconds: float) -> int:
    return round(seconds * frames.SAMPLE_RATE)
