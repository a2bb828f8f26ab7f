# SPDX-License-Identifier: Apache-2.0
"""Weak scaling: the same rows on each of more and more devices; what a device sends in a step.

Counted in the compiled program, beside what `estimate` predicts. Not only for TPUs: any number of
devices can be made of one processor, and XLA splits programs over them as over others.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from hubert_jax.planning import chips, compiled, estimate
from hubert_jax.planning.chips import Chip, Topology
from hubert_jax.planning.compiled import Measured
from hubert_jax.planning.work import Work

FAKE = Chip("cpu", math.nan, math.nan, math.nan, math.nan, 0, math.nan)  # no figures: no times


class Sent(NamedTuple):
    """Bytes that a device sends in a step, by kind of collective and axes of the mesh."""

    counted: dict[tuple[str, str], float]
    predicted: dict[tuple[str, str], float]


def topology(name: str) -> Topology:
    """As `chips.topology`; cpu:8 are eight fakes."""
    kind, _, size = name.partition(":")
    if kind == FAKE.name and size.isdigit() and int(size):
        return Topology(FAKE, (int(size),))
    found = chips.topology(name)
    if not found.chip.is_tpu:
        raise ValueError(f"{name}: programs are compiled for TPUs and for cpu:8, not for GPUs")
    return found


def on_mesh(work: Work, mesh: dict[str, int]) -> Work:
    """The same step on other devices: as many rows on each as before."""
    ways = mesh["data"] * mesh["fsdp"] * work.accumulate
    return dataclasses.replace(work, mesh=mesh, rows=work.rows_per_device * ways)


def sent(work: Work, measured: Measured) -> Sent:
    """Raises ValueError where XLA made no program, because it would not fit."""
    if not measured.fits:
        raise ValueError(
            f"{work.rows_per_device} rows of a device need {measured.peak / chips.GIB:.1f} GiB,"
            " which is too much: lower --config.batch.seconds"
        )
    counted: dict[tuple[str, str], float] = {}
    for one in measured.collectives:
        key = (one.kind, "+".join(one.axes))
        counted[key] = counted.get(key, 0.0) + one.times * one.sent_bytes
    return Sent(counted, estimate.predicted(work))


def measure(work: Work, topology: Topology) -> Sent:
    """Compiles the step for these devices."""
    return sent(work, compiled.measure(work, topology))


def rows(series: Sequence[Sent]) -> list[tuple[str, ...]]:
    """Lines of a table: kind, axes, and MB counted / predicted for each of the series."""
    keys = sorted({key for one in series for key in (*one.counted, *one.predicted)})

    def cell(counted: float, predicted: float) -> str:
        return f"{counted / 1e6:.2f} / {predicted / 1e6:.2f}"

    lines = [
        (*key, *(cell(one.counted.get(key, 0.0), one.predicted.get(key, 0.0)) for one in series))
        for key in keys
    ]
    sums = (cell(sum(one.counted.values()), sum(one.predicted.values())) for one in series)
    return [*lines, ("all", "", *sums)]
