# SPDX-License-Identifier: Apache-2.0
"""Stopping at SIGINT or SIGTERM without losing a step, and soon, also where training takes long.

While somebody is `listening`, a signal ends nothing: it is noted, and the next `heed` raises Stop.
Training heeds after each step, between the batches of a validation and, by `interruptible`, while
XLA compiles, which Python's signals cannot interrupt. The second signal acts at once.

Several processes stop at the same call of `heed`, whichever was signalled: all make the same calls
in the same order, and jax's own handler of SIGTERM, there since `processes.join`, sees to the rest.
"""

import concurrent.futures
import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from hubert_jax import processes

# Of heed, while something is compiled; several processes use their devices to agree, on which XLA
# may be timing kernels: seldom, then.
SECONDS_BETWEEN_CALLS, SECONDS_OF_SEVERAL_PROCESSES = 0.5, 5.0


class Stop(Exception):
    """A signal, by its name, has asked this run to stop."""


_received: list[str] | None = None  # while somebody is listening
_calls = itertools.count(1)  # of heed, the same in all processes


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within, signals are noted, for `heed`; where somebody is listening already, that is all.

    Raises Stop at the end where a signal was not heeded. Several processes, of which jax notes the
    signals, heed it when one of them listens again.
    """
    global _received
    if _received is not None:
        yield
        return
    several = processes.this()[1] > 1
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.getsignal(number) for number in numbers}
    received = _received = []

    def receive(number, _frame):
        received.append(signal.Signals(number).name)
        for number, handler in previous.items():
            signal.signal(number, handler)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    for number in previous:
        signal.signal(number, receive)
    try:
        yield
    finally:
        _received = None
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received and not several:
        raise Stop(received[0])


def heed() -> None:
    """Raises Stop once a signal has come; nothing where nobody is listening."""
    if _received is None:
        return
    if processes.this()[1] == 1:
        if _received:
            raise Stop(_received.pop())
    elif multihost_utils.reached_preemption_sync_point(next(_calls)):
        raise Stop("SIGTERM")  # whatever it was that one of them received


def interruptible(function) -> Callable[[Any, Any, Any], Any]:
    """`function`, jitted, of (state, batch, key), compiled for a batch of another shape heedingly.

    State, if donated, is whole when Stop is raised: nothing has begun to run.
    """
    seen = set()

    def call(state, batch, key):
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
        if shapes not in seen and _received is not None:
            _heeding(lambda: function.lower(state, batch, key).compile())
            seen.add(shapes)
        return function(state, batch, key)  # jax has the program now

    return call


def _heeding(work: Callable[[], Any]) -> None:
    """Returns once every process has done its work; what it raises is raised here."""
    mesh = jax.sharding.get_mesh()  # a thread has none; without it, results are placed otherwise

    def on_mesh() -> None:
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
            work()

    seconds = SECONDS_OF_SEVERAL_PROCESSES if processes.this()[1] > 1 else SECONDS_BETWEEN_CALLS
    pool = concurrent.futures.ThreadPoolExecutor(1)
    done = pool.submit(on_mesh)
    pool.shutdown(wait=False)
    processes.unfinished.append(done)
    while True:
        concurrent.futures.wait([done], timeout=seconds)
        is_done = done.done()
        heed()
        if processes.agree([is_done]) and is_done:
            processes.unfinished.remove(done)
            done.result()
            return
