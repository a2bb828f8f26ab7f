# SPDX-License-Identifier: Apache-2.0
"""The real training step, compiled by XLA for a TPU topology that need not be there.

libtpu brings the compiler; nothing is run and no array is made.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from hubert_jax import heads, optim, pretraining, sharding, train
from hubert_jax.planning import hlo
from hubert_jax.planning.chips import GIB, Topology
from hubert_jax.planning.work import Work

# What Google calls a machine with so many TensorCores (v4, v5p) or chips (v5e, v6e).
MACHINES = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
TOO_MUCH = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
FORCED = "nvoluntary full rematerialization"  # of the partitioner: an array had to be gathered
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class Measured(NamedTuple):
    """Of one device, in bytes; from XLA."""

    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    peak: int
    fits: bool
    collectives: list[hlo.Collective]
    rematerializations: list[str]  # what the partitioner says that it could only do the hard way
    seconds: float  # that compiling took


def devices(topology: Topology) -> list:
    """The devices of a TPU topology, as far as a compiler needs them.

    Raises ImportError without libtpu, ValueError where libtpu does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for TPUs takes libtpu: pip install 'hubert_jax[plan]', or --estimate"
        )
    name, cores = MACHINES[topology.chip.name]
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # else it asks Google's metadata server what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{name}-{topology.num_devices * cores}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock on chips that are not there
        "TPU_STDERR_LOG_LEVEL": "1",  # the partitioner's warnings, which `compile` reads
        "TPU_LOG_DIR": "disabled",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology={topology.name}: libtpu does not know it ({str(error).splitlines()[0]});"
            " --estimate counts by hand"
        ) from None
    assert len(found) == topology.num_devices, (topology, len(found))
    return list(found)


def measure(work: Work, devices: list) -> Measured:
    """Compiles the step for these devices and reads what XLA says of it."""
    started = time.perf_counter()
    mesh = sharding.make_mesh(**work.mesh, devices=devices)
    state, batch, key = arguments(work, mesh)
    sizes = {
        "parameters": _local_bytes(state.model),
        "optimizer": _local_bytes(state.opt_state),
        "batch": _local_bytes(batch),
    }
    needed, memory, text = None, None, ""
    with jax.set_mesh(mesh), _stderr() as log:
        try:
            program = step(work).lower(state, batch, key).compile()
            memory, text = program.memory_analysis(), program.as_text()
        except jax.errors.JaxRuntimeError as error:
            needed = TOO_MUCH.search(str(error))
            if needed is None:
                raise
        forced = [line for line in log().splitlines() if FORCED in line]
    if needed:
        peak = int(float(needed[1]) * UNITS[needed[2]])
        temporaries = peak - sum(sizes.values())
    else:
        temporaries = memory.temp_size_in_bytes
        peak = temporaries + memory.argument_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Measured(
        **sizes,
        temporaries=temporaries,
        peak=peak,
        fits=not needed,
        collectives=hlo.collectives(text, dict(mesh.shape)) if text else [],
        rematerializations=forced,
        seconds=time.perf_counter() - started,
    )


def step(work: Work):
    """The compiled step of hubert pretrain."""
    loss = functools.partial(pretraining.loss, config=work.loss, num_steps=work.num_steps)
    optimizer = optim.adamw(work.optim, num_steps=work.num_steps)
    return train.make_step(loss, optimizer, accumulate=work.accumulate)


def arguments(work: Work, mesh: jax.sharding.Mesh) -> tuple[train.State, dict[str, Any], Any]:
    """State, batch and key of a step, without arrays, placed as hubert pretrain places them."""
    model = heads.abstract(work.model, work.head, work.num_codes)
    shardings = sharding.param_shardings(mesh, model)
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state = jax.eval_shape(
        lambda model: train.init_state(model, optim.adamw(work.optim, num_steps=work.num_steps)),
        model,
    )
    adam = state.opt_state[1]
    placed = jax.tree.map(lambda x: _placed(x, whole), state)
    placed_adam = placed.opt_state[1]._replace(
        mu=jax.tree.map(_placed, adam.mu, shardings), nu=jax.tree.map(_placed, adam.nu, shardings)
    )
    state = placed._replace(
        model=jax.tree.map(_placed, state.model, shardings),
        opt_state=(placed.opt_state[0], placed_adam, *placed.opt_state[2:]),
    )
    shapes = {
        "audio": ((work.rows, work.num_samples), jnp.float32),
        "labels": ((work.rows, work.num_frames, len(work.num_codes)), jnp.int32),
        "weights": ((work.rows,), jnp.float32),
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }
    return state, batch, _placed(jax.eval_shape(lambda: jax.random.key(0)), whole)


def _placed(x, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _local_bytes(tree) -> int:
    """Of one device's parts of abstract arrays."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def _stderr() -> Iterator[Any]:
    """What is written to file descriptor 2 meanwhile, by C++ too: a function that reads it."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def read() -> str:
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), size, 0).decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(kept, 2)
            os.close(kept)
