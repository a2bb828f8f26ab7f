# SPDX-License-Identifier: Apache-2.0
"""Stopping at SIGINT or SIGTERM without losing a step, and soon, also where training takes long.

While somebody is `listening`, a signal ends nothing: it is noted, and the next `heed` raises Stop.
Training heeds after each step, between the batches of a validation and, by `interruptible`, while
XLA compiles, which Python's signals cannot interrupt. The second signal acts at once. Extraction,
which nobody listens to, compiles by `at_once` as well: there signals act as Python has them.

Several processes stop at the same call of `heed`, whichever was signalled: all make the same calls
in the same order, and jax's own handler of SIGTERM, there since `processes.join`, sees to the rest.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
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


def interruptible(function, ahead: Sequence[Any] = ()) -> Callable[[Any, Any, Any], Any]:
    """`function`, jitted, of (state, batch, key), compiled for a batch of another shape heedingly.

    `ahead` are batches to come, or their shapes, for which it is compiled beside the first, in as
    many threads as there are cores. State, if donated, is whole when Stop is raised: nothing has
    begun to run.
    """
    seen: set[tuple] = set()

    def call(state, batch, key):
        if _shapes(batch) not in seen and _received is not None:

            def compile_for(batch) -> None:
                function.lower(state, batch, key).compile()

            new = {_shapes(x): x for x in (*ahead, batch) if _shapes(x) not in seen}
            at_once([functools.partial(compile_for, x) for x in new.values()])
            seen.update(new)
        return function(state, batch, key)  # jax has the program now

    return call


def _shapes(batch) -> tuple:
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))


def compiles_at_once() -> bool:
    """Whether programs for several lengths are compiled when the first is needed.

    On a CPU, whose cores are few, each by itself.
    """
    return jax.default_backend() != "cpu"


def at_once(works: Sequence[Callable[[], Any]]) -> None:
    """Does `works` in threads, as many as there are cores; what the first to fail raises is raised.

    Where somebody is listening all processes call it, each with works of its own; it heeds, and
    returns once every process has done its works.
    """
    mesh = jax.sharding.get_mesh()  # a thread has none; without it, results are placed otherwise

    def on_mesh(work: Callable[[], Any]) -> None:
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
            work()

    seconds = SECONDS_OF_SEVERAL_PROCESSES if processes.this()[1] > 1 else SECONDS_BETWEEN_CALLS
    pool = concurrent.futures.ThreadPoolExecutor(min(len(works), _num_cores()))
    done = [pool.submit(on_mesh, work) for work in works]
    processes.unfinished += done
    try:
        while True:
            failed = concurrent.futures.FIRST_EXCEPTION
            ended, rest = concurrent.futures.wait(done, timeout=seconds, return_when=failed)
            is_over = not rest or any(work.exception() for work in ended)
            heed()
            agreed = _received is None or processes.agree([is_over])
            if agreed and is_over:
                break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for work in ended:
        processes.unfinished.remove(work)
    for work in ended:
        work.result()


def _num_cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
