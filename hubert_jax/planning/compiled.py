# SPDX-License-Identifier: Apache-2.0
"""The real training step, compiled by XLA for a TPU topology that need not be there.

libtpu brings the compiler; nothing is run and no array is made. A process of its own compiles,
which is ended once XLA has optimised the program, split it over the devices and laid out its
memory: making machine code comes after that and takes minutes longer. What is no TPU stands for as
many fake devices of this processor: the partitioner and the collectives are the same for them.
"""

import functools
import importlib.util
import math
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from hubert_jax import heads, optim, pretraining, sharding, train
from hubert_jax.planning import hlo
from hubert_jax.planning.chips import GIB, Topology
from hubert_jax.planning.work import Work

# What Google calls a machine with so many TensorCores (v4, v5p) or chips (v5e, v6e).
MACHINES = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
# What XLA writes to its dump, in this order.
PROGRAM, MEMORY = "after_optimizations.txt", "after_optimizations-memory-usage-report.txt"
LAST = "after_optimizations_after_buffer_assignment.txt"
HBM = re.compile(r"Memory Space: default.*\nTotal bytes: (\d+)")
TOO_MUCH = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
FORCED = "nvoluntary full rematerialization"  # of the partitioner: an array had to be gathered


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


def measure(work: Work, topology: Topology) -> Measured:
    """Compiles the step for these devices and reads what XLA says of it.

    Raises ImportError without libtpu, RuntimeError when compiling fails for another reason than
    memory.
    """
    started = time.perf_counter()
    state, batch, _ = arguments(work, sharding.abstract_mesh(**work.mesh))
    parameters, optimizer = _local_bytes(state.model), _local_bytes(state.opt_state)
    program = program_of(functools.partial(lowered, work), topology)
    if program.text:
        peak, fits = int(HBM.search(program.memory)[1]), True  # type: ignore[index]
    else:
        needed = TOO_MUCH.search(program.log)
        if needed is None:
            raise RuntimeError(f"XLA could not compile the step:\n{program.log[-2000:]}")
        peak, fits = int(float(needed[1]) * UNITS[needed[2]]), False
    return Measured(
        parameters, optimizer, _local_bytes(batch),
        temporaries=peak - parameters - optimizer - _local_bytes(batch),
        peak=peak,
        fits=fits,
        collectives=hlo.collectives(program.text, work.mesh) if program.text else [],
        rematerializations=program.rematerializations,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


class Program(NamedTuple):
    """What XLA writes of a compiled step."""

    text: str  # "": it made none
    memory: str  # its report
    log: str

    @property
    def rematerializations(self) -> list[str]:
        return [line for line in self.log.splitlines() if FORCED in line]


def program_of(lower: Callable[[list], jax.stages.Lowered], topology: Topology) -> Program:
    """`lower(devices)`, of a function that is called step, compiled in a process of its own.

    Raises ImportError without libtpu.
    """
    if topology.chip.is_tpu and importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for TPUs takes libtpu: pip install 'hubert_jax[plan]', or --estimate"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        process = multiprocessing.get_context("spawn").Process(
            target=_compile, args=(lower, topology, name), daemon=True
        )
        process.start()
        try:
            while process.is_alive() and not list(folder.glob(f"*jit_step*{LAST}")):
                process.join(0.2)
        finally:
            process.kill()
            process.join()
        log = folder / "log"
        said = log.read_text(errors="replace") if log.exists() else ""
        reports = list(folder.glob(f"*jit_step*{MEMORY}"))
        if not reports or (process.exitcode and not list(folder.glob(f"*jit_step*{LAST}"))):
            return Program("", "", said)
        (report,) = reports
        text = report.with_name(report.name.removesuffix(MEMORY) + PROGRAM)
        return Program(text.read_text(), report.read_text(), said)


def _compile(lower: Callable[[list], jax.stages.Lowered], topology: Topology, folder: str) -> None:
    """In the process of its own: XLA's log and dump go into the folder."""
    with open(os.path.join(folder, "log"), "wb") as log:
        os.dup2(log.fileno(), 2)  # XLA is C++ and knows no other stderr
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there is not dumped
    lower(devices(topology)).compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})


def lowered(work: Work, devices: list) -> jax.stages.Lowered:
    mesh = sharding.make_mesh(**work.mesh, devices=devices)
    made = arguments(work, mesh)  # outside of the mesh: it makes a constant, and nothing runs there
    with jax.set_mesh(mesh):
        return step(work).lower(*made)


def devices(topology: Topology) -> list:
    """The devices of a topology, as far as a compiler needs them."""
    if not topology.chip.is_tpu:
        count = f"--xla_force_host_platform_device_count={topology.num_devices}"
        os.environ["XLA_FLAGS"] = f"{count} {QUICK}"
        return jax.devices("cpu")
    name, cores = MACHINES[topology.chip.name]
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # else it asks Google's metadata server what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{name}-{topology.num_devices * cores}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock on chips that are not there
        "TPU_STDERR_LOG_LEVEL": "0",  # the partitioner's warnings, which `measure` reads
        "TPU_MIN_LOG_LEVEL": "0",
        "TPU_LOG_DIR": "disabled",
    }
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    if len(found) != topology.num_devices:
        raise ValueError(f"{topology.name} has {len(found)} devices for libtpu")
    return list(found)


def step(work: Work):
    """The compiled step of hubert pretrain."""
    loss = functools.partial(pretraining.loss, config=work.loss, num_steps=work.num_steps)
    optimizer = optim.adamw(work.optim, num_steps=work.num_steps)
    return train.make_step(loss, optimizer, accumulate=work.accumulate)


def arguments(
    work: Work, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> tuple[train.State, dict[str, Any], Any]:
    """State, batch and key of a step, without arrays, placed as hubert pretrain places them."""
    model = heads.abstract(work.model, work.head, work.num_codes)
    shardings = sharding.param_shardings(mesh, model)
    whole = sharding.replicated(mesh)
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
    batch = pretraining.batch_shapes(
        mesh, rows=work.rows, num_samples=work.num_samples, num_label_sets=len(work.num_codes)
    )
    return state, batch, _placed(jax.eval_shape(lambda: jax.random.key(0)), whole)


def gathered_activations(work: Work, collectives: list[hlo.Collective]) -> list[hlo.Collective]:
    """The gathers over fsdp of what is neither a parameter nor one layer or tap of it.

    Rings of permutes are gathers too: each passes on the part of one device.
    """
    model = arguments(work, sharding.abstract_mesh(**work.mesh))[0].model
    ways = work.mesh["fsdp"]
    sizes = {
        math.prod(x.sharding.shard_shape(x.shape)) * ways // entries
        for x in jax.tree.leaves(model)
        for entries in (1, x.shape[0])
    }
    parts = {"all-gather": 1, "collective-permute": ways}

    def is_parameter(one: hlo.Collective) -> bool:
        return all(math.prod(shape) * parts[one.kind] in sizes for shape in one.shapes)

    among = [one for one in collectives if one.kind in parts and "fsdp" in one.axes]
    return [one for one in among if not is_parameter(one)]


def _placed(x, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _local_bytes(tree) -> int:
    """Of one device's parts of abstract arrays."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )
