# SPDX-License-Identifier: Apache-2.0
"""Collectives read from a program's text, on programs whose collectives are known."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hubert_jax import sharding
from hubert_jax.planning import hlo


def mesh_of(**sizes):
    return sharding.make_mesh(**({"data": 1, "fsdp": 1, "tensor": 1} | sizes))


def read(function, *args, mesh):
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*args).compile().as_text()
    return hlo.collectives(text, dict(mesh.shape))


def mapped(function, mesh):
    return jax.shard_map(
        function, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(), check_vma=False
    )


X = np.ones((8, 6), np.float32)


@pytest.mark.parametrize(("axis", "size"), [("data", 2), ("fsdp", 4)])
def test_a_sum_is_found_with_its_axis_and_bytes(axis, size):
    mesh = mesh_of(data=2, fsdp=4)
    (one,) = read(mapped(lambda x: jax.lax.psum(x, axis), mesh), X, mesh=mesh)
    assert (one.kind, one.axes, one.group_size, one.times) == ("all-reduce", (axis,), size, 1)
    assert one.shapes == ((1, 6),) and one.result_bytes == 24
    assert one.sent_bytes == 2 * 24 * (size - 1) / size


def test_a_gather_is_found_and_counts_what_the_others_hold():
    mesh = mesh_of(data=2, fsdp=4)
    gather = mapped(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), mesh)
    (one,) = read(gather, X, mesh=mesh)
    assert (one.kind, one.axes, one.result_bytes) == ("all-gather", ("fsdp",), 4 * 24)
    assert one.sent_bytes == 3 * 24


def test_both_axes_at_once():
    mesh = mesh_of(data=2, fsdp=4)
    (one,) = read(mapped(lambda x: jax.lax.psum(x, ("data", "fsdp")), mesh), X, mesh=mesh)
    assert one.axes == ("data", "fsdp") and one.group_size == 8


def test_a_loop_counts_as_often_as_it_turns():
    mesh = mesh_of(data=8)

    def loop(x):
        def turn(x, _):
            return jnp.tanh(jax.lax.psum(x, "data")), None

        return jax.lax.scan(turn, x, length=5)[0]

    found = read(mapped(loop, mesh), X, mesh=mesh)
    assert [(one.kind, one.times) for one in found] == [("all-reduce", 5)]


RING = """
%turn (p: (bf16[8], u32[])) -> (bf16[8], u32[]) {{
  %p = (bf16[8]{{0}}, u32[]) parameter(0)
  %part = bf16[8]{{0}} get-tuple-element(%p), index=0
  %sent = bf16[8]{{0}} collective-permute(%part), source_target_pairs={{{{0,1}},{{1,0}}}}
  %count = u32[] get-tuple-element(%p), index=1
  %step = u32[] constant({step})
  %next = u32[]{{:T(128)}} add(%count, %step), metadata={{op_name="add(%x)"}}
  ROOT %result = (bf16[8]{{0}}, /*index=1*/u32[]) tuple(%sent, /*index=1*/%next)
}}

%more (p: (bf16[8], u32[])) -> pred[] {{
  %limit = u32[] constant({limit})
  %p = (bf16[8]{{0}}, u32[]) parameter(0)
  %count = u32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%count, %limit), direction={direction}
}}

ENTRY %main (x: (bf16[8], u32[])) -> (bf16[8], u32[]) {{
  %x = (bf16[8]{{0}}, u32[]) parameter(0)
  ROOT %loop = (bf16[8]{{0}}, u32[]) while(%x), condition=%more, body=%turn
}}
"""


@pytest.mark.parametrize("is_short", [False, True])
@pytest.mark.parametrize(("limit", "step", "turns"), [(8, 1, 8), (8, 2, 4), (7, 2, 4)])
def test_a_loop_that_xla_does_not_count_is_counted_by_its_steps(limit, step, turns, is_short):
    text = RING.format(limit=limit, step=step, direction="LT")
    if is_short:  # as libtpu 0.0.50 writes it, of jax 0.12
        text = re.sub(r"  %(part|count) = .*\n", "", text)
        text = text.replace("%part", "%p#0").replace("%count", "%p#1")
    (one,) = hlo.collectives(text, {"data": 2})
    assert (one.kind, one.times, one.sent_bytes) == ("collective-permute", turns, 16)


def test_a_loop_whose_counter_another_computation_makes_is_an_error():
    text = RING.format(limit=8, step=1, direction="LT").replace("=1*/%next", "=1*/%fusion#1")
    with pytest.raises(ValueError, match="counter's step is not known"):
        hlo.collectives(text, {"data": 2})


def test_a_loop_that_does_not_count_up_is_an_error():
    with pytest.raises(ValueError, match="without a known number of turns"):
        hlo.collectives(RING.format(limit=8, step=1, direction="GT"), {"data": 2})


def test_a_sum_that_the_partitioner_made_is_found_too():
    mesh = mesh_of(data=8)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    (one,) = read(lambda x: jnp.sum(x, axis=0), x, mesh=mesh)
    assert one.kind == "all-reduce" and one.result_bytes == 24


GROUPS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ("fsdp",),
    "replica_groups=[4,2]<=[8]": ("fsdp",),
    "replica_groups=[2,4]<=[4,2]T(1,0)": ("data",),
    "replica_groups={}": ("data", "fsdp"),
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": ("fsdp",),
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": ("data",),
    "replica_groups=mesh['a'=8] {'a':(4)2}": ("fsdp",),
    "replica_groups=mesh['a'=4,'b'=2] {'a','b'}": ("data", "fsdp"),
}


@pytest.mark.parametrize("form", GROUPS)
@pytest.mark.parametrize("opcode", ["all-gather", "all-gather-start"])
def test_every_form_of_groups(form, opcode):
    shapes = "bf16[16,8]{1,0:T(8,128)(2,1)}"
    if opcode.endswith("-start"):
        shapes = f"(bf16[8,8]{{1,0}}, {shapes})"
    text = (
        "ENTRY %main (p: bf16[8,8]) -> bf16[16,8] {\n"
        "  %p = bf16[8,8]{1,0} parameter(0)\n"
        f"  ROOT %g = {shapes} {opcode}(%p), {form}, dimensions={{0}}\n"
        "}\n"
    )
    (one,) = hlo.collectives(text, {"data": 4, "fsdp": 2, "tensor": 1})
    assert one.axes == GROUPS[form] and one.result_bytes == 256


def test_groups_that_cannot_be_read_are_an_error():
    text = (
        "ENTRY %m (p: f32[2]) -> f32[2] {\n  %g = f32[2]{0} all-reduce(%p), replica_groups=?\n}\n"
    )
    with pytest.raises(ValueError, match="replica groups in a form"):
        hlo.collectives(text, {"data": 2})
