# SPDX-License-Identifier: Apache-2.0
"""How long saving a checkpoint holds training up, and how long until it is on disk."""

import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
from etils import epath

from hubert_jax import checkpoints, sharding, train
from hubert_jax.bench import ours
from hubert_jax.heads import HeadConfig
from hubert_jax.model import HubertConfig
from hubert_jax.optim import OptimConfig


class Saved(NamedTuple):
    """Seconds from the call until `save` returned, and until everything was on disk."""

    blocked: float
    on_disk: float
    num_bytes: int


def saves(
    config: HubertConfig,
    head: HeadConfig,
    optimizer: OptimConfig,
    folder: epath.Path,
    *,
    count: int,
) -> Iterator[Saved]:
    """Saves a training state `count` times, each once the one before is on disk."""
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    with jax.set_mesh(mesh):
        state = jax.block_until_ready(ours.state(config, head, optimizer, 500, mesh))
        kept = checkpoints.CheckpointConfig(every=1, keep_last=1, keep_every=0)
        saved = checkpoints.Checkpoints(folder, kept)
        try:
            for step in range(1, count + 1):
                started = time.perf_counter()
                saved.save(_at(state, step), {"kind": "bench"})
                blocked = time.perf_counter() - started
                saved.wait()
                on_disk = time.perf_counter() - started
                yield Saved(blocked, on_disk, _num_bytes(folder / str(step)))
        finally:
            saved.close()


def _at(state: train.State, step: int) -> train.State:
    return state._replace(step=jax.numpy.full_like(state.step, step))


def _num_bytes(folder: epath.Path) -> int:
    files = pathlib.Path(folder).rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())
