# SPDX-License-Identifier: Apache-2.0
"""Contenders for one piece of work, timed in turn, so that a noisy machine hits all alike."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hubert_jax import logs

Work = Callable[[], object]  # done once, and over when it returns

WARM_UPS = 2  # calls of everybody before the first that is timed
SHORTEST_TURN = 0.2  # seconds; a work that takes less is repeated


class Contender(NamedTuple):
    name: str
    prepare: Callable[[], Work]
    note: str = ""


class Timing(NamedTuple):
    """Seconds of one contender. `first` is its first call: compilation and warming up."""

    name: str
    seconds: list[float]
    first: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def alternate(
    title: str, contenders: Sequence[Contender], *, rounds: int, warm_ups: int = WARM_UPS
) -> list[Timing]:
    """Everybody `warm_ups` times, then `rounds` rounds of everybody in turn.

    Works shorter than a turn (in their last call to warm up) are repeated in it, and the first is
    not counted: it would pay for the contender before, whose threads go on spinning for some
    milliseconds (OpenMP's do).
    """
    works, firsts, repeats = [], [], []
    for contender in contenders:
        logs.info(f"{title}: {contender.name} warms up")
        started = time.perf_counter()
        work = contender.prepare()
        work()
        firsts.append(time.perf_counter() - started)
        warm = [firsts[-1], *(_seconds(work) for _ in range(warm_ups - 1))][-1]
        repeats.append(max(1, math.ceil(SHORTEST_TURN / warm)))
        works.append(work)
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, times, spent in zip(works, repeats, seconds, strict=True):
            if times > 1:
                work()
            spent.append(_seconds(work, times))
    return [
        Timing(contender.name, spent, first, contender.note)
        for contender, spent, first in zip(contenders, seconds, firsts, strict=True)
    ]


def _seconds(work: Work, times: int = 1) -> float:
    """Of one work, where it is done so many times on end."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times
