# SPDX-License-Identifier: Apache-2.0
"""Spawned worker processes that report what they have done and end with the process they serve."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any

from hubert_jax.data import leftovers

SECONDS_BETWEEN_REPORTS = 0.2
SHIELDED = (signal.SIGINT, signal.SIGTERM)
SECONDS_AFTER_SIGTERM = 60.0  # that a loader still serves: whoever reads from it saves first

Report = Callable[[float], None]


class Stopped(Exception):
    """Raised within a worker's report when another one has failed or the run is interrupted."""


def run(
    function: Callable[..., Any], tasks: Iterable[tuple], *, num_workers: int, report: Report
) -> list[Any]:
    """`[function(*task, report=report) for task in tasks]`, by `num_workers` fresh processes.

    With 0 it is just that. Otherwise `report` is called in this process with what the workers
    report. The first error stops them all and is raised again here.
    """
    tasks = list(tasks)
    if num_workers == 0 or not tasks:
        return [function(*task, report=report) for task in tasks]
    leftovers.sign()
    context = multiprocessing.get_context("spawn")
    queue, stop = context.SimpleQueue(), context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        min(num_workers, len(tasks)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(queue, stop),
    ) as pool:
        futures = [pool.submit(_call, function, task) for task in tasks]
        try:
            _follow(futures, queue, report)
            return [future.result() for future in futures]
        except BaseException as error:
            stop.set()
            for future in futures:
                future.cancel()
            _follow(futures, queue, report, only_wait=True)
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise ChildProcessError(
                    f"one of {num_workers} worker processes was killed, out of memory perhaps; "
                    f"what is finished is kept: start again, with fewer workers if need be"
                ) from error
            raise


def _follow(futures: Sequence[concurrent.futures.Future], queue, report, *, only_wait=False):
    """Passes reports on until all are done or one has failed (`only_wait`: until all are done)."""
    pending = set(futures)
    while pending:
        done, pending = concurrent.futures.wait(
            pending,
            timeout=SECONDS_BETWEEN_REPORTS,
            return_when=concurrent.futures.FIRST_COMPLETED,
        )
        while not queue.empty():
            report(queue.get())
        if not only_wait:
            for future in done:
                future.result()


_queue: Any = None  # of this process, if it is a worker
_stop: Any = None


def _start_worker(queue, stop) -> None:
    global _queue, _stop
    _queue, _stop = queue, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Loaders that are started within get SIGINT and SIGTERM once they `serve`, and not before."""
    leftovers.sign()
    resource_tracker.ensure_running()  # when it starts, it lets these signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(index: int, count: int) -> None:
    """What loader `index` of `count` does first: SIGINT and SIGTERM are for the process it serves.

    They come to all processes, from a terminal or from SLURM, and that one has a step to finish.
    """
    leftovers.sign()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _end_later())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_later() -> None:
    ending = threading.Timer(SECONDS_AFTER_SIGTERM, os._exit, [1])
    ending.daemon = True
    ending.start()


def _end_with_parent() -> None:
    """A worker whose parent is killed would otherwise wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(function: Callable[..., Any], task: tuple) -> Any:
    return function(*task, report=_report)


def _report(amount: float) -> None:
    if _stop.is_set():
        raise Stopped
    _queue.put(amount)
