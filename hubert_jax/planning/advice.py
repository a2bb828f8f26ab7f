# SPDX-License-Identifier: Apache-2.0
"""Which mesh, how much recomputation and how many rows at once: the quickest that should fit."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from hubert_jax.ops import frames
from hubert_jax.planning import estimate
from hubert_jax.planning.chips import Topology
from hubert_jax.planning.estimate import Estimate
from hubert_jax.planning.work import Work

MAX_FSDP = 32  # over 64 of v5e XLA gathers by summing zeros, twice the bytes (docs/SCALING.md)


class Advice(NamedTuple):
    work: Work
    estimate: Estimate

    def flags(self, config_work: Work, row_multiple: int) -> str:
        """What to give hubert pretrain."""
        mesh = self.work.mesh
        flags = [f"--config.mesh.data={mesh['data']}", f"--config.mesh.fsdp={mesh['fsdp']}"]
        if self.work.model.remat != config_work.model.remat:
            flags.append(f"--config.model.remat={self.work.model.remat}")
        if self.work.accumulate != config_work.accumulate:
            flags.append(f"--config.train.accumulate={self.work.accumulate}")
        ways = mesh["data"] * mesh["fsdp"] * self.work.accumulate
        if row_multiple % ways:
            flags.append(f"--config.batch.row_multiple={ways}")
        return " ".join(flags)


def rows(seconds: float, num_samples: int, multiple: int) -> int:
    """Rows of a global batch of `seconds`, as the batch plan has them; 0 if too few."""
    return round(seconds * frames.SAMPLE_RATE) // num_samples // multiple * multiple


def best(work: Work, topology: Topology) -> Advice | None:
    """The quickest arrangement of this batch that fits, by the counts; None if none does.

    Of equals the one with fewer parts, less recomputation and less fsdp comes first.
    """
    found = None
    for candidate in candidates(work, topology.num_devices):
        counted = estimate.estimate(candidate, topology)
        if not estimate.fits(counted.memory, topology):
            continue
        if found is None or counted.longest < 0.99 * found.estimate.longest:
            found = Advice(candidate, counted)
    return found


def candidates(work: Work, num_devices: int) -> Iterator[Work]:
    ways = [n for n in range(1, min(num_devices, MAX_FSDP) + 1) if num_devices % n == 0]
    for remat, fsdp in itertools.product(("none", "dots", "layer"), ways):
        rows = work.rows // num_devices
        for parts in [n for n in range(1, rows + 1) if rows % n == 0]:
            yield dataclasses.replace(
                work,
                model=dataclasses.replace(work.model, remat=remat),
                mesh={"data": num_devices // fsdp, "fsdp": fsdp, "tensor": 1},
                accumulate=parts,
            )
