# SPDX-License-Identifier: Apache-2.0
"""Recordings of any length, in overlapping windows: cut the audio, join the features.

Up to 30 s a recording is one window, and its features are those of a single pass. A longer one is
cut into windows of 30 s, each starting 25 s after the one before, and the last ending with the
recording, so that all of them have one static shape. Where windows overlap (5 s, or more before the
last), their features are averaged with weights that rise linearly from the edge of each window
inwards, over 5 s: the frames at an edge, which lack context on one side, hardly count, and nothing
jumps. Memory is that of two windows, however long the recording is.

S samples, T frames, D width
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from hubert_jax.ops import frames

WINDOW = 30 * frames.FRAME_RATE  # frames: the longest piece of a corpus, twice a training crop
OVERLAP = 5 * frames.FRAME_RATE


class Window(NamedTuple):
    first_frame: int
    is_last: bool
    wave_S: np.ndarray


def cut(blocks: Iterable[np.ndarray]) -> Iterator[Window]:
    """The windows of a recording that comes in blocks of samples, of whatever lengths.

    A recording of less than one frame (400 samples) has none.
    """
    held_S, first_frame = np.zeros(0, np.float32), 0  # samples from the start of the next window
    stride, longest = WINDOW - OVERLAP, frames.num_samples(WINDOW)
    kept_S = held_S  # the stride of samples before held_S: the last window may reach back into it
    for block_S in blocks:
        held_S = np.concatenate([held_S, block_S])
        while frames.num_frames(len(held_S)) > WINDOW:
            yield Window(first_frame, False, held_S[:longest])
            kept_S, held_S = np.split(held_S, [stride * frames.HOP])
            first_frame += stride
    num_frames = frames.num_frames(len(held_S))
    if first_frame == 0 and num_frames == 0:
        return
    if first_frame == 0:
        yield Window(0, True, held_S)
    else:
        back = WINDOW - num_frames
        wave_S = np.concatenate([kept_S[len(kept_S) - back * frames.HOP :], held_S])
        yield Window(first_frame - back, True, wave_S[:longest])


class Join:
    """The features of one recording from those of its windows, given in order.

    >>> join = Join()
    >>> for window in cut(blocks):
    ...     write(join.add(window, features_TD))
    """

    def __init__(self) -> None:
        self._first_frame = 0
        self._sum_TD: np.ndarray | None = None  # frames that may still change
        self._weight_T = np.zeros(0, np.float32)

    def add(self, window: Window, features_TD: np.ndarray) -> np.ndarray:
        """The frames that are finished now, following those given before."""
        num_frames, width = features_TD.shape
        if self._sum_TD is None:
            self._sum_TD = np.zeros((0, width), np.float32)
        start = window.first_frame - self._first_frame
        done_TD = self._sum_TD[:start] / self._weight_T[:start, None]
        grown = max(0, start + num_frames - len(self._sum_TD))
        self._sum_TD = np.concatenate([self._sum_TD[start:], np.zeros((grown, width), np.float32)])
        self._weight_T = np.concatenate([self._weight_T[start:], np.zeros(grown, np.float32)])
        self._first_frame = window.first_frame

        weight_T = _weights(num_frames, is_first=window.first_frame == 0, is_last=window.is_last)
        self._sum_TD[:num_frames] += weight_T[:, None] * features_TD
        self._weight_T[:num_frames] += weight_T
        if not window.is_last:
            return done_TD
        return np.concatenate([done_TD, self._sum_TD / self._weight_T[:, None]])


def _weights(num_frames: int, *, is_first: bool, is_last: bool) -> np.ndarray:
    """1 inside, falling linearly over OVERLAP frames towards an edge that is not the recording's.

    With an overlap of exactly OVERLAP the weights of the two windows add up to 1.
    """
    place_T = np.arange(num_frames)
    weight_T = np.ones(num_frames, np.float32)
    if not is_first:
        weight_T = np.minimum(weight_T, (place_T + 0.5) / OVERLAP)
    if not is_last:
        weight_T = np.minimum(weight_T, (num_frames - place_T - 0.5) / OVERLAP)
    return weight_T.astype(np.float32)
