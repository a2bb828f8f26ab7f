# SPDX-License-Identifier: Apache-2.0
"""More devices, each with as many rows: what each sends is what the model of it says.

The real step, compiled for 2 and 8 fake devices; `hubert plan --weak_scaling` makes the table for
up to 64 of them, and for TPUs (docs/SCALING.md). XLA on CPU has no reduce-scatter, so a gradient
that should be summed and split is summed everywhere: twice the bytes of a reduce-scatter.
"""

import functools

import jax
import pytest

from hubert_jax import sharding
from hubert_jax.optim import OptimConfig
from hubert_jax.planning import compiled, hlo, scaling
from hubert_jax.planning.compiled import Measured
from hubert_jax.planning.work import Work
from hubert_jax.pretraining import LossConfig
from hubert_jax.stages import plan
from tests import tiny

OPTIM = OptimConfig(1e-3, 10, 0.9, 0.98, 1e-6, 0.01, 1.0)
SERIES = {
    "data": [dict(data=2), dict(data=8)],
    "fsdp": [dict(fsdp=2), dict(fsdp=8)],
    "data x fsdp": [dict(fsdp=2), dict(data=4, fsdp=2)],
    "data x tensor": [dict(tensor=2), dict(data=4, tensor=2)],
}


def work(**mesh):
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    model = tiny.model()
    return Work(
        model.encoder.config, model.head.config, (12,), LossConfig(10.0, 0.0, 0.0), OPTIM,
        num_steps=100, mesh=sizes, rows=2 * sizes["data"] * sizes["fsdp"], num_samples=8_080,
        accumulate=1,
    )  # fmt: skip


def collectives(one: Work) -> list[hlo.Collective]:
    """As `compiled.measure` reads them, without a process of their own."""
    text = compiled.lowered(one, jax.devices()[: one.num_devices]).compile().as_text()
    return hlo.collectives(text, one.mesh)


@functools.cache
def sent(**mesh) -> scaling.Sent:
    one = work(**mesh)
    measured = Measured(0, 0, 0, 0, 0, True, collectives(one), [], 0.0)
    assert not compiled.gathered_activations(one, measured.collectives)
    return scaling.sent(one, measured)


def of_kind(sizes: dict[tuple[str, str], float], kind: str) -> float:
    return sum(size for key, size in sizes.items() if key[0] == kind)


@pytest.mark.parametrize("mesh", SERIES["data"], ids=str)
def test_data_parallel_sends_the_gradients_once(mesh):
    counted, predicted = sent(**mesh)
    assert {kind for kind, _ in counted} == {"all-reduce"}
    assert sum(counted.values()) == pytest.approx(sum(predicted.values()), rel=0.05)


@pytest.mark.parametrize("mesh", [*SERIES["fsdp"], *SERIES["data x fsdp"][1:]], ids=str)
def test_fsdp_gathers_parameters_and_nothing_else(mesh):
    counted, predicted = sent(**mesh)
    assert of_kind(counted, "all-gather") < 1.05 * of_kind(predicted, "all-gather")
    gradients = 2 * of_kind(predicted, "reduce-scatter") + of_kind(predicted, "all-reduce")
    assert of_kind(counted, "all-reduce") < 1.05 * gradients
    assert {kind for kind, _ in counted} == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("mesh", SERIES["data x tensor"], ids=str)
def test_tensor_sums_the_residual_twice_a_layer_and_way(mesh):
    counted, predicted = sent(**mesh)
    key = ("all-reduce", "tensor")
    assert counted[key] == pytest.approx(predicted[key], rel=0.05)


@pytest.mark.parametrize("name", SERIES)
def test_what_is_sent_grows_as_predicted_and_no_more(name):
    """Gradients that are summed whole grow twice as much as predicted."""
    smaller, larger = (sent(**mesh) for mesh in SERIES[name])
    growth, expected = (
        sum(after.values()) - sum(before.values())
        for before, after in zip(smaller, larger, strict=True)
    )
    small, large = (of_kind(each.predicted, "reduce-scatter") for each in (smaller, larger))
    assert 0 < growth < 1.05 * (expected + large - small)


def test_the_command_compiles_each_and_sets_counted_beside_predicted(capsys):
    sizes = [
        "model.conv_width=8", "model.width=16", "model.ffn_width=32", "model.num_layers=2",
        "model.position_kernel=16", "model.position_groups=2", "head.code_width=8",
        "model.compute_dtype=float32",
    ]  # fmt: skip
    plan.main(
        ["--config=configs/demo.py", "--weak_scaling=cpu:1,cpu:2", "--mesh=data:-1"]
        + [f"--config.{size}" for size in sizes]
    )
    output = capsys.readouterr().out
    assert "4 rows of 1.99 s a device" in output
    cells = [line.strip("| ").split(" | ") for line in output.splitlines() if line[:1] == "|"]
    assert [cell.strip() for cell in cells[0]] == ["collective", "over", "cpu:1", "cpu:2"]
    assert [cell.strip() for cell in cells[2][:3]] == ["all-reduce", "data", "0.00 / 0.00"]
    counted, predicted = (float(size) for size in cells[2][3].split(" / "))
    assert counted == pytest.approx(predicted, abs=0.011) and counted > 0.03


def test_more_devices_keep_their_rows():
    grown = scaling.on_mesh(work(data=2), dict(data=4, fsdp=2, tensor=2))
    assert grown.rows_per_device == work(data=2).rows_per_device == 2
    assert (grown.rows, grown.num_devices) == (16, 16)


def test_a_gathered_activation_is_told_from_a_gathered_parameter():
    one = work(fsdp=4)

    def gathered(*shape: int) -> hlo.Collective:
        return hlo.Collective("all-gather", ("fsdp",), (shape,), 0, 4, 1)

    activation = gathered(one.rows, one.num_frames, 32)
    parameters = [gathered(32, 64), gathered(3, 16, 16), gathered(1, 16, 16)]
    passed_on = gathered(2, one.num_frames, 32)._replace(kind="collective-permute")
    found = compiled.gathered_activations(one, [*parameters, activation, passed_on])
    assert found == [activation, passed_on]


def test_activations_split_where_parameters_are_get_gathered(monkeypatch):
    monkeypatch.setitem(sharding.RULES, "batch", "data")
    monkeypatch.setitem(sharding.RULES, "residual", "fsdp")
    one = work(data=2, fsdp=2)
    assert compiled.gathered_activations(one, collectives(one))


def test_the_table_has_a_column_for_each_and_a_sum():
    sums = ("all-reduce", "data")
    small = scaling.Sent({sums: 2e6}, {sums: 1e6})
    large = scaling.Sent({sums: 3e6, ("all-gather", "fsdp"): 1e6}, {sums: 3e6})
    assert scaling.rows([small, large]) == [
        ("all-gather", "fsdp", "0.00 / 0.00", "1.00 / 0.00"),
        ("all-reduce", "data", "2.00 / 1.00", "3.00 / 3.00"),
        ("all", "", "2.00 / 1.00", "4.00 / 3.00"),
    ]
