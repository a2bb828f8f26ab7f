# SPDX-License-Identifier: Apache-2.0
"""More devices, each with as many rows: what each sends is what the model of it says.

The real step, compiled for 2, 4 and 8 devices. XLA on CPU has no reduce-scatter, so a gradient that
should be summed and split is summed everywhere: twice the bytes of a reduce-scatter.
"""

import jax
import pytest

from hubert_jax import sharding
from hubert_jax.optim import OptimConfig
from hubert_jax.planning import compiled, estimate, hlo
from hubert_jax.planning.work import Work
from hubert_jax.pretraining import LossConfig
from tests import tiny

OPTIM = OptimConfig(1e-3, 10, 0.9, 0.98, 1e-6, 0.01, 1.0)


def work(**mesh):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    model = tiny.model()
    return Work(
        model.encoder.config, model.head.config, (12,), LossConfig(10.0, 0.0, 0.0), OPTIM,
        num_steps=100, mesh=sizes, rows=2 * sizes["data"] * sizes["fsdp"], num_samples=8_080,
        accumulate=1,
    )  # fmt: skip


def sent(work: Work) -> tuple[dict, dict]:
    """Bytes by kind, counted and predicted."""
    mesh = sharding.make_mesh(**work.mesh, devices=jax.devices()[: work.num_devices])
    with jax.set_mesh(mesh):
        text = compiled.step(work).lower(*compiled.arguments(work, mesh)).compile().as_text()
    counted: dict[str, float] = {}
    for one in hlo.collectives(text, work.mesh):
        counted[one.kind] = counted.get(one.kind, 0.0) + one.times * one.sent_bytes
    predicted: dict[str, float] = {}
    for (kind, _), size in estimate.predicted(work).items():
        predicted[kind] = predicted.get(kind, 0.0) + size
    return counted, predicted


@pytest.mark.parametrize("ways", [2, 8])
def test_data_parallel_sends_the_gradients_once(ways):
    counted, predicted = sent(work(data=ways))
    assert set(counted) == {"all-reduce"}
    assert counted["all-reduce"] == pytest.approx(predicted["all-reduce"], rel=0.05)


@pytest.mark.parametrize("ways", [2, 8])
def test_fsdp_gathers_parameters_and_nothing_else(ways):
    counted, predicted = sent(work(fsdp=ways))
    assert counted["all-gather"] < 1.05 * predicted["all-gather"]
    gradients = predicted["reduce-scatter"] * 2 + predicted["all-reduce"]
    assert counted["all-reduce"] < 1.05 * gradients
    assert set(counted) == {"all-gather", "all-reduce"}
