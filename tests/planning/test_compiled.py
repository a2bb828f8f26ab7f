# SPDX-License-Identifier: Apache-2.0
"""Base, compiled for a v5e of four chips: what it holds and sends stays inside bounds."""

import collections
import importlib.util

import pytest

from hubert_jax import config_files
from hubert_jax.planning import chips, compiled, estimate
from hubert_jax.stages import plan

pytestmark = [
    pytest.mark.plan,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="compiling for TPUs takes libtpu: pip install 'hubert_jax[plan]'",
    ),
]
GIB = 2**30
TOPOLOGY = chips.topology("v5e:2x2")


@pytest.fixture(scope="module")
def base():
    """4 rows of 15.6 s a device, parameters split in two."""
    config = config_files.load("configs/base.py")
    rung = plan.Rung(249_680, 16, 1.0)
    work = plan.work(config, {"data": 2, "fsdp": 2, "tensor": 1}, rung)
    return work, compiled.measure(work, TOPOLOGY)


def test_memory_is_inside_its_bounds(base):
    work, measured = base
    assert measured.fits and measured.peak < 8 * GIB  # 6.84 on 2026-11-25
    assert measured.temporaries < 7.5 * GIB
    held = estimate.memory(work)
    assert measured.parameters == held.parameters
    # The moments, and a few counters.
    assert 0 <= measured.optimizer - held.optimizer < 100


def test_nothing_is_gathered_that_need_not_be(base):
    work, measured = base
    assert not measured.rematerializations
    assert not compiled.gathered_activations(work, measured.collectives)
    predicted = estimate.predicted(work)
    gathered = [one for one in measured.collectives if one.kind == "all-gather"]
    assert gathered and all(one.axes == ("fsdp",) for one in gathered)
    size = sum(one.times * one.sent_bytes for one in gathered)
    assert size < 1.3 * predicted["all-gather", "fsdp"]


def test_collectives_are_no_more_than_they_were(base):
    """On 2026-11-25: 222, 56 and 13."""
    _, measured = base
    times = collections.Counter()
    for one in measured.collectives:
        times[one.kind] += one.times
    assert times.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert times["all-gather"] < 260 and times["all-reduce"] + times["reduce-scatter"] < 80


def test_all_that_is_sent_is_what_was_predicted(base):
    work, measured = base
    size = sum(one.times * one.sent_bytes for one in measured.collectives)
    assert size < 1.3 * sum(estimate.predicted(work).values())
