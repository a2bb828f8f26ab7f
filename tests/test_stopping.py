# SPDX-License-Identifier: Apache-2.0
"""Signals are heeded where training waits long: while XLA compiles, and in several processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import processes, sharding, stopping
from tests.test_padding import compilations

GRACE_SECONDS = 5.0  # a compilation that is waited for takes a minute here


def signal_after(seconds: float, number: int = signal.SIGTERM) -> None:
    threading.Timer(seconds, os.kill, [os.getpid(), number]).start()


class Slow:
    """A jitted function that is compiled for a minute, and counts how often it was."""

    def __init__(self, seconds: float = 60.0, error: Exception | None = None):
        self.seconds, self.error, self.compilations, self.end = seconds, error, 0, threading.Event()

    def lower(self, *_):
        return self

    def compile(self):
        self.compilations += 1
        self.end.wait(self.seconds)
        if self.error:
            raise self.error

    def __call__(self, state, batch, key):
        return state + 1, batch


def test_a_signal_is_noted_and_heeded():
    stopping.heed()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(stopping.Stop, match="SIGTERM"), stopping.listening():
        stopping.heed()
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.heed()
        pytest.fail("not heeded")
    stopping.heed()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_signal_after_the_last_call_is_heeded_at_the_end():
    with pytest.raises(stopping.Stop, match="SIGTERM"), stopping.listening():
        stopping.heed()
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def interrupts():
    """As in a terminal; a shell starts what it puts into the background without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_acts_at_once(interrupts):
    with pytest.raises(KeyboardInterrupt), stopping.listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # two at once would be one


def test_a_compilation_is_not_waited_for():
    slow = Slow()
    step = stopping.interruptible(slow)
    began = time.monotonic()
    with stopping.listening(), pytest.raises(stopping.Stop, match="SIGTERM"):
        signal_after(0.3)
        step(0, jnp.ones(3), None)
    assert slow.compilations == 1 and time.monotonic() - began < GRACE_SECONDS
    slow.end.set()


@pytest.fixture
def cores(monkeypatch) -> int:
    monkeypatch.setattr(stopping, "_num_cores", lambda: 2)
    return 2


def test_of_many_compilations_none_begins_after_a_signal(cores, monkeypatch):
    monkeypatch.setattr(processes, "unfinished", [])
    slow = Slow()
    step = stopping.interruptible(slow, [jnp.ones(length) for length in range(cores + 2)])
    with stopping.listening(), pytest.raises(stopping.Stop, match="SIGTERM"):
        signal_after(0.3)
        step(0, jnp.ones(1), None)
    slow.end.set()
    for work in processes.unfinished:
        assert work.cancelled() or work.result(timeout=GRACE_SECONDS) is None
    assert slow.compilations == cores


def test_what_the_first_to_fail_raises_is_not_kept_back(cores, monkeypatch):
    monkeypatch.setattr(processes, "unfinished", [])
    slow = Slow()

    class Failing(Slow):
        def lower(self, _, batch, key):
            return self if batch.shape == (3,) else slow

    step = stopping.interruptible(Failing(0.3, MemoryError()), [jnp.ones(3), jnp.ones(4)])
    began = time.monotonic()
    with stopping.listening(), pytest.raises(MemoryError):
        step(0, jnp.ones(3), None)
    assert time.monotonic() - began < GRACE_SECONDS
    assert [work.done() for work in processes.unfinished] == [False]
    slow.end.set()


def test_every_shape_is_compiled_once_and_what_that_raises_is_raised():
    quick = Slow(seconds=0.0)
    step = stopping.interruptible(quick)
    with stopping.listening():
        for length in (3, 4, 3, 4):
            assert step(1, jnp.ones(length), None)[0] == 2
        assert quick.compilations == 2
        with pytest.raises(MemoryError):
            stopping.interruptible(Slow(0.0, MemoryError()))(0, jnp.ones(3), None)


def test_what_is_to_come_is_compiled_beside_the_first(cores):
    class Meeting(Slow):
        """Whose compilations wait for each other."""

        barrier = threading.Barrier(2, timeout=60)

        def compile(self):
            self.barrier.wait()
            super().compile()

    meeting = Meeting(seconds=0.0)
    step = stopping.interruptible(meeting, [jnp.ones(3), jax.ShapeDtypeStruct((4,), jnp.float32)])
    with stopping.listening():
        for length in (4, 3, 4):
            step(1, jnp.ones(length), None)
        assert meeting.compilations == 2
        threading.Thread(target=meeting.barrier.wait).start()
        step(1, jnp.ones(5), None)  # which nobody has foretold
        assert meeting.compilations == 3


@pytest.mark.parametrize("is_foretold", [False, True])
def test_what_is_compiled_heedingly_is_what_jax_then_runs(is_foretold):
    """Else every program would be compiled twice, and the second time without heeding."""
    batches = [np.ones((8, length), np.float32) for length in (3, 3, 3, 4)]
    mesh = sharding.make_mesh(data=4, fsdp=2, tensor=1)

    def step(state, batch, key):
        return state + jnp.dot(batch["rows"], jnp.ones(batch["rows"].shape[1])), key

    with jax.set_mesh(mesh):
        put = [sharding.put_batch(mesh, {"rows": batch}) for batch in batches]
        state = sharding.put_batch(mesh, {"state": np.zeros(8, np.float32)})["state"]
        key, rows = jax.random.key(0), sharding.batch_sharding(mesh)
        ahead = [
            {"rows": jax.ShapeDtypeStruct((8, length), jnp.float32, sharding=rows)}
            for length in (3, 4)
        ]
        counts: list[int] = []
        with compilations() as compiled, stopping.listening():
            step = jax.jit(step, donate_argnums=0)
            step = stopping.interruptible(step, ahead if is_foretold else [])
            for batch in put:
                state, _ = step(state, batch, key)
                counts.append(len(compiled))
    assert np.asarray(state).tolist() == [13.0] * 8
    assert counts == (4 * [2] if is_foretold else [1, 1, 1, 2]), compiled


LEAVING = """
import os, signal, threading, time
from hubert_jax import processes, stopping

class Slow:
    lower = lambda self, *_: self
    compile = lambda self: time.sleep(60)

try:
    with stopping.listening():
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
        stopping.interruptible(Slow())(0, (), None)
except stopping.Stop:
    print("stopped")
    processes.leave(130, together=True)
"""


def test_a_process_that_ends_does_not_wait_for_it_either():
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "stopped\n"), ended.stderr
    assert time.monotonic() - began < 6 * GRACE_SECONDS


# Both train on one batch of two rows; a signal to one of them stops both after the same step.
TOGETHER = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from hubert_jax import processes, sharding, stopping
processes.join(processes.Told(sys.argv[1], 2, int(sys.argv[2])), heartbeat_timeout=20)
mesh = sharding.make_mesh(data=2, fsdp=1, tensor=1)

class Slow:
    def __init__(self, function):
        self.function = function
    def lower(self, *_):
        return self
    def compile(self):
        print("compiles", flush=True)
        time.sleep(SECONDS)
    def __call__(self, *args):
        return self.function(*args)

def step(state, batch, key):
    return state + batch.sum(), key

with jax.set_mesh(mesh), stopping.listening():
    step = stopping.interruptible(Slow(jax.jit(step)), [np.ones((2, 4), np.float32)])
    batch = sharding.put_batch(mesh, {"rows": np.ones((1, 3), np.float32)})["rows"]
    state, done = jnp.zeros([]), 0
    try:
        while True:
            stopping.heed()
            state, _ = step(state, batch, jnp.zeros([]))
            done += 1
            time.sleep(0.01)
            print("steps", flush=True)
    except stopping.Stop as stop:
        print(f"stopped by {stop} after {done}, state {float(state)}", flush=True)
        processes.leave(130, together=True)
"""


@pytest.mark.parametrize("where", ["compiles", "steps"])
def test_several_processes_stop_together(where):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    seconds = "60" if where == "compiles" else "0.1 + int(sys.argv[2])"  # one has it sooner
    script = TOGETHER.replace("SECONDS", seconds)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"XLA_FLAGS": ""},
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        for run in runs:
            assert run.stdout is not None
            while where not in run.stdout.readline():  # gloo's words stand around it, at times
                assert run.poll() is None, run.communicate()
        began = time.monotonic()
        runs[1].send_signal(signal.SIGTERM)
        said = [run.communicate(timeout=60) for run in runs]
        seconds_taken = time.monotonic() - began
        print(f"{where}: both ended after {seconds_taken:.1f} s")
        first, second = (out.splitlines()[-1] for out, _ in said)
        assert first == second and [run.returncode for run in runs] == [130, 130], said
        done = int(first.split()[4].rstrip(","))
        assert first == f"stopped by SIGTERM after {done}, state {6.0 * done}"
        assert seconds_taken < 30 and bool(done) == (where == "steps")
    finally:
        for run in runs:
            run.kill()
            run.communicate()
