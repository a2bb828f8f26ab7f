# SPDX-License-Identifier: Apache-2.0
"""An array that has to be gathered whole to be split another way is told of, by the name that
`hubert plan` looks for; on fake devices, and by the partitioner inside libtpu.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hubert_jax import sharding
from hubert_jax.planning import compiled, scaling

TOPOLOGIES = [
    "cpu:8",
    pytest.param(
        "v5e:2x4",
        marks=[
            pytest.mark.plan,
            pytest.mark.skipif(
                importlib.util.find_spec("libtpu") is None,
                reason="compiling for TPUs takes libtpu: pip install 'hubert_jax[plan]'",
            ),
        ],
    ),
]


def lower(devices, *, before: P, after: P):
    """A step whose array comes split one way and is wanted another."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)

    @jax.jit
    def step(x):
        return jnp.sin(jax.lax.with_sharding_constraint(jnp.cos(x), NamedSharding(mesh, after)))

    return step.lower(
        jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, before))
    )


def hard(devices):
    """Rows over all devices, the last axis of the mesh first; then columns over two of the axes."""
    rows, columns = ("tensor", "fsdp", "data"), ("data", "tensor")
    return lower(devices, before=P(rows, None), after=P(None, columns))


def easy(devices):
    """From rows to columns, all to all."""
    return lower(devices, before=P("data", None), after=P(None, "data"))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_full_rematerialization_is_seen(name):
    topology = scaling.topology(name)
    program = compiled.program_of(hard, topology)
    (line, *_) = program.rematerializations
    assert "Involuntary full rematerialization" in line and "step" in program.text


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_what_can_be_split_another_way_is_not_one(name):
    program = compiled.program_of(easy, scaling.topology(name))
    assert program.text and not program.rematerializations
