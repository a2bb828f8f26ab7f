# SPDX-License-Identifier: Apache-2.0
"""Worker processes: order, errors, kills."""

import functools
import os
import signal
import time

import pytest

from hubert_jax.data import workers


def square(number, *, report):
    report(float(number))
    return number**2, os.getpid()


def fail_or_go_on(number, *, report):
    """The first task fails; the others would report for ten minutes if nobody stopped them."""
    if number == 0:
        raise OSError(28, "no space left")
    for _ in range(6000):
        time.sleep(0.1)
        report(1.0)


def kill_itself(number, *, report):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_are_in_order_and_reports_complete(num_workers):
    reports = []
    tasks = [(n,) for n in range(5)]
    results = workers.run(square, tasks, num_workers=num_workers, report=reports.append)
    assert [number for number, _ in results] == [0, 1, 4, 9, 16]
    assert sorted(reports) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert ({pid for _, pid in results} == {os.getpid()}) == (num_workers == 0)


def test_the_first_error_stops_the_others():
    started = time.monotonic()
    with pytest.raises(OSError, match="no space left"):
        workers.run(fail_or_go_on, [(1,), (0,), (2,)], num_workers=2, report=lambda amount: None)
    assert time.monotonic() - started < 60


def test_a_killed_worker_is_explained():
    run = functools.partial(workers.run, num_workers=1, report=lambda amount: None)
    with pytest.raises(ChildProcessError, match="out of memory perhaps"):
        run(kill_itself, [(0,)])


def test_no_tasks_need_no_workers():
    assert workers.run(square, [], num_workers=2, report=lambda amount: None) == []
