# SPDX-License-Identifier: Apache-2.0
"""The rows of many shards as batches on the devices, in order or shuffled, read ahead of them.

Shards are arrays or memory maps (rows, D); only the batches in flight are in memory. Every process
of a run reads the part of a batch that lies on its own devices.

N rows, D width
"""

import collections
import concurrent.futures
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

RUN_ROWS = 32  # shuffled rows come in runs of neighbours: fewer reads, and still many utterances
READ_AHEAD = 3  # batches


class Batch(NamedTuple):
    """Rows on the devices, zeros after the first `num_rows`."""

    features_ND: jax.Array
    num_rows: int
    next_run: int  # the number of runs that a pass has given once it has given this batch


class Reader:
    """Batches of the rows of `shards`; `sharding` says how a batch's rows lie on the devices."""

    def __init__(self, shards: Sequence[np.ndarray], sharding: NamedSharding):
        self._shards = [np.asarray(shard) for shard in shards]  # slices of np.memmap are slow
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        self.sharding = sharding
        self.num_rows = int(self._starts[-1])
        self.width = self._shards[0].shape[1]

    @property
    def num_devices(self) -> int:
        """How many devices the rows of a batch are split over."""
        return math.prod(self.sharding.mesh.shape[axis] for axis in self.sharding.spec[0])

    def in_order(self, batch_rows: int, *, first_run: int = 0) -> Iterator[Batch]:
        """All rows as they lie in the shards, but those of the runs before `first_run`."""
        starts = np.arange(0, self.num_rows, RUN_ROWS)
        return self._read_ahead(starts, batch_rows, first_run)

    def shuffled(
        self, batch_rows: int, random: np.random.Generator, *, first_run: int = 0
    ) -> Iterator[Batch]:
        """All rows, each batch made of runs of RUN_ROWS from anywhere in the shards."""
        starts = np.arange(0, self.num_rows, RUN_ROWS)
        return self._read_ahead(random.permutation(starts), batch_rows, first_run)

    def sample(self, num_rows: int, random: np.random.Generator) -> np.ndarray:
        """`num_rows` different rows, evenly at random, in host memory."""
        rows_N = np.sort(random.choice(self.num_rows, num_rows, replace=False))
        return self._read([(row, row + 1) for row in rows_N.tolist()], num_rows)

    def replicate(self, tree):
        """The same arrays on every device."""
        return jax.device_put(tree, NamedSharding(self.sharding.mesh, P()))

    def _read_ahead(self, starts: np.ndarray, batch_rows: int, first_run: int) -> Iterator[Batch]:
        runs = max(1, min(batch_rows, self.num_rows) // RUN_ROWS)  # of one batch
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            ahead: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
            for first in range(first_run, len(starts), runs):
                ahead.append(reader.submit(self._batch, starts, first, runs))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _batch(self, starts: np.ndarray, first: int, num_runs: int) -> Batch:
        next_run = min(first + num_runs, len(starts))
        stretches = _stretches(np.sort(starts[first:next_run]), self.num_rows)
        padded_rows = -(-num_runs * RUN_ROWS // self.num_devices) * self.num_devices

        def local(index) -> np.ndarray:
            first, stop, _ = index[0].indices(padded_rows)
            return self._read(_cut(stretches, first, stop), stop - first)

        shape = (padded_rows, self.width)
        features_ND = jax.make_array_from_callback(shape, self.sharding, local)
        num_rows = sum(stop - start for start, stop in stretches)
        return Batch(features_ND, num_rows, next_run)

    def _read(self, stretches: Sequence[tuple[int, int]], num_rows: int) -> np.ndarray:
        """The rows of all stretches, then zeros up to `num_rows`."""
        features_ND = np.empty((num_rows, self.width), self._shards[0].dtype)
        filled, position = 0, 0
        for start, stop in stretches:
            while start < stop:
                while start >= self._starts[position + 1]:
                    position += 1
                here = start - self._starts[position]
                part_ND = self._shards[position][here : here + stop - start]
                features_ND[filled : filled + len(part_ND)] = part_ND
                filled += len(part_ND)
                start += len(part_ND)
        features_ND[filled:] = 0
        return features_ND


def _stretches(starts: np.ndarray, num_rows: int) -> list[tuple[int, int]]:
    """(start, stop) of the runs at `starts`, ascending, those that touch joined into one."""
    breaks = np.flatnonzero(np.diff(starts) != RUN_ROWS)
    firsts = starts[np.concatenate([[0], breaks + 1])]
    stops = starts[np.concatenate([breaks, [-1]])] + RUN_ROWS
    return list(zip(firsts.tolist(), np.minimum(stops, num_rows).tolist(), strict=True))


def _cut(stretches: list[tuple[int, int]], first: int, stop: int) -> list[tuple[int, int]]:
    """The part of the stretches that holds their rows `first` to `stop`, counted from 0."""
    cut, passed = [], 0
    for start, end in stretches:
        low, high = max(first - passed, 0), min(stop - passed, end - start)
        if low < high:
            cut.append((start + low, start + high))
        passed += end - start
    return cut
