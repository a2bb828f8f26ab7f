# SPDX-License-Identifier: Apache-2.0
"""Flash attention, its kernels interpreted on the CPU, is the plain attention with dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from hubert_jax import attention, flash
from hubert_jax.layers import dropout
from tests.cuda import GPU, SHARDS, lowered

KEY = jax.random.key(7)
SEEDS = jax.random.bits(KEY, (2,))
LENGTHS = [1, 1000, 32]  # at most T of them
BLOCKS = {  # small, and not as many queries as keys
    "forward": flash.Blocks(queries=32, keys=16, num_warps=4, num_stages=2),
    "for_keys": flash.Blocks(queries=16, keys=32, num_warps=4, num_stages=2),
    "for_queries": flash.Blocks(queries=16, keys=32, num_warps=4, num_stages=2),
}


def arrays(num_frames: int, dtype=jnp.float32, batch: int = len(LENGTHS), num_heads: int = 2):
    """Query, key, value and a gradient of what comes out, for heads of width 16."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (batch, num_heads, num_frames, 16), dtype) for key in keys]


def attend_heads(query_BHTK, key_BHTK, value_BHTK, **options):
    """The kernels with heads first, as the plain attention has them."""
    qkv_BTCHK = jnp.stack([query_BHTK, key_BHTK, value_BHTK]).transpose(1, 3, 0, 2, 4)
    return flash.attend(qkv_BTCHK, **options).swapaxes(1, 2)


def lengths(num_frames: int):
    return jnp.minimum(jnp.array(LENGTHS), num_frames)


def interpreted(num_frames: int, rate: float, **options):
    return functools.partial(
        attend_heads, lengths_B=lengths(num_frames), seeds_2=SEEDS, rate=rate, interpret=True,
        **BLOCKS, **options,
    )  # fmt: skip


def plain(num_frames: int, rate: float):
    valid_BT = jnp.arange(num_frames) < lengths(num_frames)[:, None]
    drop = functools.partial(dropout, rate=rate, key=KEY)
    return functools.partial(attention.plain, valid_BT=valid_BT, drop=drop)


def with_gradients(attend, query, key, value, grad):
    @jax.jit
    def run(query, key, value, grad):
        mixed, pull = jax.vjp(attend, query, key, value)
        return mixed, *pull(grad)

    return run(query, key, value, grad)


def assert_close(got, want, tolerance: float = 2e-6):
    """Within `tolerance` of the largest number of each array."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * jnp.abs(b).max())


def assert_differ(got, other):
    assert all(jnp.abs(a - b).max() > 0.01 for a, b in zip(got, other, strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("num_frames", [7, 32, 77])
def test_values_and_gradients_are_those_of_the_plain_attention(num_frames, rate):
    """T below a block, one block, and several blocks with a part of one, both ways."""
    got = with_gradients(interpreted(num_frames, rate), *arrays(num_frames))
    assert_close(got, with_gradients(plain(num_frames, rate), *arrays(num_frames)))
    assert_differ(got, with_gradients(plain(num_frames, 0.3 - rate), *arrays(num_frames)))


def test_padding_gets_no_gradient():
    _, _, key_grad, value_grad = with_gradients(interpreted(77, 0.3), *arrays(77))
    inside_BT = np.arange(77) < lengths(77)[:, None]
    for grad_BHTK in (key_grad, value_grad):
        assert ((np.abs(grad_BHTK).max(axis=(1, 3)) > 0) == inside_BT).all()


def test_a_row_without_frames_is_zeros():
    none = functools.partial(interpreted(20, 0.3), lengths_B=jnp.zeros(3, jnp.int32))
    assert not any(x.any() for x in with_gradients(none, *arrays(20)))


def test_large_logits_neither_overflow_nor_leak_from_padding():
    """All far below the 0 of padding; of logits near -300 the last bits are 3e-5 of a weight."""
    query, _, value, grad = arrays(77)
    args = [10 * jnp.abs(query), -10 * jnp.abs(value), value, grad]
    got = with_gradients(interpreted(77, 0.3), *args)
    assert_close(got, with_gradients(plain(77, 0.3), *args), 1e-4)


@pytest.mark.parametrize(
    ("rows", "heads"), [(slice(1, 3), slice(0, 4)), (slice(0, 3), slice(2, 4))]
)
def test_a_part_drops_what_the_whole_drops(rows, heads):
    x = arrays(33, num_heads=4)
    whole = with_gradients(interpreted(33, 0.3), *x)
    part = functools.partial(
        interpreted(33, 0.3), lengths_B=lengths(33)[rows], first=(rows.start, heads.start),
        num_heads=4,
    )  # fmt: skip
    x = [a[rows, heads] for a in x]
    got = with_gradients(part, *x)
    assert_close(got, [a[rows, heads] for a in whole])
    assert_differ(got, with_gradients(functools.partial(part, first=(0, 1)), *x))


def sharded(attend, lengths_B, mesh, **options):
    """`attend` of 4 x 4 rows and heads over the 2 x 2 devices of `mesh`."""

    def own(query, key, value, lengths_B, seeds_2):
        first = 2 * jax.lax.axis_index("data"), 2 * jax.lax.axis_index("tensor")
        return attend(
            query, key, value, lengths_B=lengths_B, seeds_2=seeds_2, first=first, num_heads=4
        )

    place = P("data", "tensor")
    specs = (place, place, place, P("data"), P())
    whole = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=place, **options)
    return lambda query, key, value: whole(query, key, value, lengths_B, SEEDS)


def test_shards_drop_what_the_whole_drops():
    """What varies over devices is not checked: interpreted kernels do not get through that."""
    x = arrays(20, batch=4, num_heads=4)
    attend = functools.partial(interpreted(20, 0.3), lengths_B=jnp.array([20, 1, 13, 16]))
    mesh = jax.make_mesh(*SHARDS[:2], axis_types=SHARDS[2])
    shards = sharded(attend, attend.keywords["lengths_B"], mesh, check_vma=False)
    assert_close(with_gradients(shards, *x), with_gradients(attend, *x))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_bfloat16_is_close_to_float32(rate):
    got = with_gradients(interpreted(77, rate), *arrays(77, jnp.bfloat16))
    exact = [x.astype(jnp.float32) for x in arrays(77, jnp.bfloat16)]
    want = with_gradients(interpreted(77, rate), *exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 0.01


@pytest.mark.parametrize("width", [8, 24])
def test_it_refuses_what_tensor_cores_do_not_take(width):
    with pytest.raises(ValueError, match=f"heads of width {width}"):
        flash.attend(jnp.zeros((1, 4, 3, 1, width)), jnp.array([4]), SEEDS, rate=0.1)


def program(attend, shape, **options) -> str:
    """Of the gradients, for an NVIDIA GPU."""
    x_BHTK = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def run(query, key, value, grad):
        return jax.vjp(attend, query, key, value)[1](grad)

    return lowered(run, x_BHTK, x_BHTK, x_BHTK, x_BHTK, **options)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_it_lowers_for_cuda_as_three_kernels(rate, checked_kernels):
    """Nothing of T x T is left in the program."""
    attend = functools.partial(
        attend_heads, lengths_B=jnp.array([781, 400]), seeds_2=SEEDS, rate=rate
    )
    text = program(attend, (2, 12, 781, 64))
    assert text.count("xla.gpu.triton") == len(checked_kernels) == 3
    assert "781x781" not in text


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_shards_lower_for_cuda_with_all_checks():
    attend = functools.partial(attend_heads, rate=0.1)
    split = sharded(attend, jnp.array([781, 400, 1, 0]), AbstractMesh(*SHARDS, abstract_device=GPU))
    text = program(split, (4, 4, 781, 64), mesh=SHARDS)
    assert text.count("xla.gpu.triton") == 3
