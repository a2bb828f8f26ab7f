# SPDX-License-Identifier: Apache-2.0
"""The same loss and gradients on every layout of eight devices; moments lie with parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from hubert_jax import optim, pretraining, sharding, train
from tests import tiny

LAYOUTS = {
    "data 8": dict(data=8, fsdp=1, tensor=1),
    "fsdp 8": dict(data=1, fsdp=8, tensor=1),
    "data 2, fsdp 2, tensor 2": dict(data=2, fsdp=2, tensor=2),
    "fsdp 4, tensor 2": dict(data=1, fsdp=4, tensor=2),
}
OPTIM = optim.OptimConfig(
    peak_lr=1e-2, warmup_steps=1, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=1.0
)
LOSS = functools.partial(
    pretraining.loss, config=pretraining.LossConfig(10.0, 0.0, 0.0), num_steps=10
)


def batch(rows=8, samples=8_000):
    rng = np.random.default_rng(0)
    num_frames = (samples - 400) // 320 + 1
    return {
        "audio": rng.normal(size=(rows, samples)).astype(np.float32),
        "labels": rng.integers(0, 12, (rows, num_frames, 1)).astype(np.int32),
        "weights": np.ones(rows, np.float32),
    }


def loss_and_gradients(layout, devices=None):
    mesh = sharding.make_mesh(**layout, devices=devices)
    with jax.set_mesh(mesh):
        model = sharding.make_sharded(lambda key: tiny.model(), jax.random.key(0), mesh)

        def loss(model, batch):
            value = LOSS(model, batch, jax.random.key(1), 0)
            return value.total / value.weight

        return jax.device_get(
            jax.jit(jax.value_and_grad(loss))(model, sharding.put_batch(mesh, batch()))
        )


@functools.cache
def on_one_device():
    return loss_and_gradients(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_do_not_depend_on_the_layout(layout):
    loss, gradients = loss_and_gradients(LAYOUTS[layout])
    want_loss, want_gradients = on_one_device()
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_are_sharded_like_their_parameters_before_and_after_a_step(layout):
    mesh = sharding.make_mesh(**LAYOUTS[layout])
    with jax.set_mesh(mesh):
        model = sharding.make_sharded(lambda key: tiny.model(), jax.random.key(0), mesh)
        optimizer = optim.adamw(OPTIM, num_steps=10)
        state = train.init_state(model, optimizer)
        step = train.make_step(LOSS, optimizer, accumulate=1)
        states = [jax.tree.map(lambda x: x.sharding, state)]
        state, _ = step(state, sharding.put_batch(mesh, batch()), jax.random.key(0))
        states.append(jax.tree.map(lambda x: x.sharding, state))
    shapes = jax.tree.leaves(jax.tree.map(jnp.ndim, state.model))
    for shardings in states:
        params = jax.tree.leaves(shardings.model)
        adam = shardings.opt_state[1]
        for moment in (adam.mu, adam.nu):
            for ours, param, ndim in zip(jax.tree.leaves(moment), params, shapes, strict=True):
                assert ours.is_equivalent_to(param, ndim)
        if LAYOUTS[layout]["fsdp"] > 1:
            assert any(not param.is_fully_replicated for param in params)


def test_fsdp_divides_the_memory():
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    model = sharding.make_sharded(lambda key: tiny.model(), jax.random.key(0), mesh)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model))
    assert on_first < total / 4  # the smallest arrays stay whole


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=3, fsdp=1, tensor=1),
        dict(data=-1, fsdp=-1, tensor=1),
        dict(data=4, fsdp=1, tensor=1),
    ],
)
def test_an_impossible_mesh_is_refused_with_the_possible_sizes(sizes):
    with pytest.raises(
        ValueError, match=r"does not fit 8 devices: give sizes among \[1, 2, 4, 8\]"
    ):
        sharding.make_mesh(**sizes)


class Device:
    """As much of a device as a mesh looks at."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number: int, **attributes: int):
        self.id = number
        self.__dict__ |= attributes

    def __repr__(self) -> str:
        return f"{self.__dict__}"


@pytest.mark.parametrize("island", ["slice_index", "process_index"])
def test_only_data_parallelism_goes_across_islands(island):
    # Interleaved, as a network may number them.
    devices = [Device(n, **{"process_index": 0, island: n % 2}) for n in range(8)]
    mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for group in mesh.devices:
        assert len({getattr(device, island) for device in group.flat}) == 1
    assert {device.id for device in mesh.devices.flat} == set(range(8))


ROWS = ("data", "fsdp")
NAMED_POINTS = {
    "(8, 25, 16)": (ROWS, None, None),  # what the convolutions give
    "(8, 25, 32)": (ROWS, None, None),  # before the layers, and after each
    "(8, 25, 64)": (ROWS, None, "tensor"),  # inside the feed-forward
    "(3, 8, 4, 25, 8)": (None, ROWS, "tensor", None, None),  # queries, keys and values
}


def test_activations_are_constrained_at_the_named_points():
    mesh, wave_BS = sharding.make_mesh(data=2, fsdp=2, tensor=2), jnp.zeros((8, 8_080))
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(lambda model, x: model.features(x, layer=3))(
            tiny.model().encoder, wave_BS
        )
    found = list(constraints(traced.jaxpr))
    assert {shape: tuple(spec) for shape, spec in found} == NAMED_POINTS
    assert len(found) == len(NAMED_POINTS) + 1  # of the residual there are two


def constraints(jaxpr):
    """(shape, PartitionSpec) of every constraint of an array's layout, those in loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            yield str(equation.outvars[0].aval.shape), equation.params["sharding"].spec
        for inner in core.jaxprs_in_params(equation.params):
            yield from constraints(inner)


def test_every_row_of_a_batch_is_loaded_where_it_lies():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    parts = sharding.batch_parts(mesh)
    assert parts == ((0, 1, 2, 3), 4)
    rows = batch()
    for name, array in sharding.put_batch(mesh, rows).items():
        np.testing.assert_array_equal(array, rows[name])
