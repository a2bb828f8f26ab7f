# SPDX-License-Identifier: Apache-2.0
"""Contenders for one piece of work, timed in turn, so that a noisy machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hubert_jax import logs

Work = Callable[[], object]  # done once, and over when it returns


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


def alternate(title: str, contenders: Sequence[Contender], *, rounds: int) -> list[Timing]:
    """Everybody once to warm up, and once more, then `rounds` rounds of everybody in turn."""
    works, firsts = [], []
    for contender in contenders:
        logs.info(f"{title}: {contender.name} warms up")
        started = time.perf_counter()
        work = contender.prepare()
        work()
        firsts.append(time.perf_counter() - started)
        work()
        works.append(work)
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, spent in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            spent.append(time.perf_counter() - started)
    return [
        Timing(contender.name, spent, first, contender.note)
        for contender, spent, first in zip(contenders, seconds, firsts, strict=True)
    ]
