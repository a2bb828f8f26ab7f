# SPDX-License-Identifier: Apache-2.0
"""Several processes of one run: how they are told of each other, and that they end together.

What they compute is compared in tests/test_several_processes.py.
"""

import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from hubert_jax import processes
from hubert_jax.processes import Told


def told(coordinator=None, num_processes=None, process_id=None, **variables):
    return processes.told(coordinator, num_processes, process_id, variables)


SLURM = {"SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1"}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "host:1",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def test_a_run_that_is_told_nothing_is_alone():
    assert told() is None
    assert told(**SLURM, SLURM_STEP_NUM_TASKS="1") is None
    assert told(TPU_WORKER_HOSTNAMES="localhost") is None
    assert told(JAX_NUM_PROCESSES="") is None
    assert processes.this() == (0, 1)


def test_options_come_before_variables_and_variables_before_launchers():
    assert told(**JAX) == Told("host:1", 4, 3)
    assert told(process_id=0, **JAX, **SLURM) == Told("host:1", 4, 0)
    assert told("other:2", 2, 1, **JAX) == Told("other:2", 2, 1)
    assert told("host:1", 1, 0) is None


@pytest.mark.parametrize(
    "variables",
    [
        {**SLURM, "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_launchers_that_jax_knows_are_left_to_it(variables):
    assert told(**variables) == Told(None, None, None)
    assert told("auto") == Told(None, None, None)


def test_half_of_what_is_needed_is_refused():
    with pytest.raises(ValueError, match="missing: process_id"):
        told("host:1", 2)
    with pytest.raises(ValueError, match="--process_id=2 of --num_processes=2"):
        told("host:1", 2, 2)


WAITING = """
import sys, time
from hubert_jax import processes
processes.join(processes.Told(sys.argv[1], 2, int(sys.argv[2])), heartbeat_timeout=5)
processes.wait("start")
print("started", flush=True)
if sys.argv[2] == "1":
    time.sleep(120)
processes.wait("for the one that dies")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_do_not_wait_for_a_process_that_died(number):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", WAITING, address, str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    )  # fmt: skip
    try:
        assert second.stdout is not None
        while "started" not in second.stdout.readline():  # gloo's words stand around it, at times
            assert second.poll() is None
        started = time.monotonic()
        second.send_signal(number)
        _, complaint = first.communicate(timeout=90)
        print(f"{number.name}: ended after {time.monotonic() - started:.1f} s")
        assert first.returncode != 0
        assert re.search(r"Task 1 heartbeat timeout|heartbeats\):\n1\n", complaint), complaint
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
