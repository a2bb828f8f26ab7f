# SPDX-License-Identifier: Apache-2.0
"""One run on several processes: how they find each other, wait, agree and end together.

Every process runs the same command on the same work directory, which all of them reach. They are
told of each other, in this order, by

    --coordinator=HOST:PORT --num_processes=N --process_id=I
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID      the same, as variables
    --coordinator=auto                                              what jax finds, as on a TPU pod
    srun or mpirun with several tasks, a slice of TPU hosts on GKE  found by jax as well

and a run that is told nothing is one process. A process that dies without a word is missed after
`heartbeat_timeout` seconds; the others are then ended by jax, which names it.
"""

import concurrent.futures
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from hubert_jax.data import leftovers

AUTO = "auto"
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


class Told(NamedTuple):
    """What a process knows of the others; without num_processes, jax finds out."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def told(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    variables: Mapping[str, str],
) -> Told | None:
    """What options and `variables` (of the environment) say; None: this is the only process.

    Raises ValueError when only some of the three are given.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    if coordinator == AUTO:
        return Told(None, num_processes, process_id)
    for name, variable in VARIABLES.items():
        if given[name] is None and variables.get(variable):
            given[name] = variables[variable]
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return Told(None, None, None) if _launched_together(variables) else None
    if missing:
        raise ValueError(
            f"several processes need all of --coordinator, --num_processes and --process_id (or"
            f" {', '.join(VARIABLES.values())}); missing: {', '.join(missing)}"
        )
    count, index = int(given["num_processes"] or 1), int(given["process_id"] or 0)
    if not 0 <= index < count:
        raise ValueError(
            f"--process_id={index} of --num_processes={count}: they are numbered from 0"
        )
    return Told(str(given["coordinator"]), count, index) if count > 1 else None


def _launched_together(variables: Mapping[str, str]) -> bool:
    """Whether a launcher that jax knows has started more than this process."""
    slurm = "SLURM_STEP_NODELIST" in variables and "SLURM_PROCID" in variables
    counts = [
        int(variables.get("SLURM_STEP_NUM_TASKS", 1)) if slurm else 1,
        int(variables.get("OMPI_COMM_WORLD_SIZE", 1)),
        int(variables.get("MEGASCALE_NUM_SLICES", 1)),
        len(variables.get("TPU_WORKER_HOSTNAMES", "").split(",")),
    ]
    return max(counts) > 1


def join(others: Told | None, *, heartbeat_timeout: int) -> None:
    """Waits for the other processes; to be called before anything touches a device.

    Raises ValueError when `auto` finds nothing, OSError when the others do not come.
    """
    if others is None:
        return
    try:
        jax.distributed.initialize(
            coordinator_address=others.coordinator,
            num_processes=others.num_processes,
            process_id=others.process_id,
            # Told everything, it need not look; and each process has all devices that it sees.
            cluster_detection_method="deactivate" if others.coordinator else None,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:
        raise ValueError(
            f"jax finds no other processes here ({error}): give --coordinator=HOST:PORT"
            " --num_processes=N --process_id=I"
        ) from error
    except RuntimeError as error:
        raise OSError(f"the processes of this run do not find each other: {error}") from error


def this() -> tuple[int, int]:
    """(index, count) of this process; touches no device in a run of one."""
    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes cards, reports and metrics."""
    return this()[0] == 0


def name() -> str:
    """' in process 3 of 8', for messages; nothing in a run of one."""
    index, count = this()
    return f" in process {index} of {count}" if count > 1 else ""


def wait(what: str) -> None:
    """Returns once every process has come to the same place."""
    if this()[1] > 1:
        multihost_utils.sync_global_devices(what)


def wait_long(what: str, *, seconds: float) -> None:
    """As `wait`, where one process may take minutes: asks the coordinator, and no device.

    Collectives of devices give up sooner (gloo after 30 s). jax has no public way to ask.
    """
    if this()[1] > 1:
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"hubert_jax {what}", int(1000 * seconds))


def agree(numbers: Sequence[int]) -> bool:
    """Whether every process came with these, of which there are less than eight; it waits."""
    if this()[1] == 1:
        return True
    padded = np.full(8, -1, np.int32)
    padded[: len(numbers)] = numbers
    everyones = multihost_utils.process_allgather(padded)
    return bool((everyones == padded).all())


unfinished: list[concurrent.futures.Future] = []  # of threads, perhaps not waited for any longer


def leave(code: int, *, together: bool) -> NoReturn:
    """Ends the process: in order, or at once where that would wait for what nobody needs.

    That is a thread still at work, and the other processes of one that failed (not `together`).
    """
    if all(work.done() for work in unfinished) and (together or this()[1] == 1):
        sys.exit(code)
    try:
        if together and jax.distributed.is_initialized():
            jax.distributed.shutdown()
    finally:
        leftovers.remove_folders()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
