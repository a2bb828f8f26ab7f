# SPDX-License-Identifier: Apache-2.0
"""Flash attention that drops weights, for NVIDIA's GPUs: three Pallas kernels through Triton.

Nothing of T x T is ever stored: a kernel makes the weights of one block of queries and one block
of keys, drops some by the very bits of `layers.dropout`, uses them and forgets them; backwards they
and their bits are made again. T. Dao, FlashAttention-2 (arXiv 2307.08691), says why that is exact.

B batch, T frames, C query, key and value, H heads, K head width; Q queries and N keys of a block
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hubert_jax.layers import bits_of_rows, is_kept

QUERY, KEY, VALUE = np.arange(3, dtype=np.int32)  # the interpreter wants arrays
NARROWEST = 16  # head width and block: what a tensor core multiplies


class Blocks(NamedTuple):
    """How a kernel cuts its work, powers of two, and what it asks of Triton."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


FORWARD = Blocks(queries=64, keys=64, num_warps=4, num_stages=3)
FOR_KEYS = Blocks(queries=64, keys=64, num_warps=4, num_stages=2)
FOR_QUERIES = Blocks(queries=64, keys=64, num_warps=4, num_stages=2)


def attend(
    qkv_BTCHK, lengths_B, seeds_2, *, rate: float,
    first=(0, 0), num_heads: int | None = None, interpret: bool = False,
    forward: Blocks = FORWARD, for_keys: Blocks = FOR_KEYS, for_queries: Blocks = FOR_QUERIES,
):  # fmt: skip
    """The values of a row's first `lengths_B` frames, weighted for each of its T queries: BTHK.

    With `seeds_2 = jax.random.bits(key, (2,))` it drops what `layers.dropout(weights, rate, key)`
    would of weights (B, H, T, T); of a part of the rows and heads, `first` is the place of its
    first ones in the whole and `num_heads` how many the whole has. A row of length 0 gives zeros.
    Products of float32 are in TF32 on a GPU. `interpret` runs the kernels on any platform, slowly;
    the blocks are of the forward pass and of the gradients for keys with values and for queries.
    Raises ValueError where a head's width is not a power of two from 16 on.
    """
    batch, num_frames, _, heads, width = qkv_BTCHK.shape
    if width < NARROWEST or width & (width - 1):
        raise ValueError(f"heads of width {width}; it takes powers of two from {NARROWEST} on")
    bits_BHT = None
    if rate:
        first_row, first_head = (jnp.asarray(place).astype(jnp.uint32) for place in first)
        row_B11 = first_row + jnp.arange(batch, dtype=jnp.uint32)[:, None, None]
        head_H1 = first_head + jnp.arange(heads, dtype=jnp.uint32)[:, None]
        row_BH1 = row_B11 * jnp.uint32(num_heads or heads) + head_H1[None]
        frame_T = jnp.arange(num_frames, dtype=jnp.uint32)
        row_BHT = row_BH1 * jnp.uint32(num_frames) + frame_T[None, None]
        bits_BHT = bits_of_rows(row_BHT, seeds_2)
    how = _How(float(rate), interpret, forward, for_keys, for_queries)
    lengths_B = jnp.minimum(lengths_B, num_frames).astype(jnp.int32)
    return _attend(how, qkv_BTCHK, lengths_B, bits_BHT)


class _How(NamedTuple):
    rate: float
    interpret: bool
    forward: Blocks
    for_keys: Blocks
    for_queries: Blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, qkv_BTCHK, lengths_B, bits_BHT):
    return _forward(how, qkv_BTCHK, lengths_B, bits_BHT)[0]


def _forward(how, qkv_BTCHK, lengths_B, bits_BHT):
    """The mixed values; and what the backward pass needs, with the log2 of the softmax's sums."""
    batch, num_frames, _, heads, width = qkv_BTCHK.shape
    mixed_BTHK, sums_BHT = _call(
        _mix, how, how.forward, how.forward.queries,
        [((batch, num_frames, heads, width), qkv_BTCHK.dtype),
         ((batch, heads, num_frames), jnp.float32)],
        lengths_B, bits_BHT, qkv_BTCHK,
    )  # fmt: skip
    return mixed_BTHK, (lengths_B, bits_BHT, qkv_BTCHK, mixed_BTHK, sums_BHT)


def _backward(how, saved, grad_BTHK):
    lengths_B, bits_BHT, qkv_BTCHK, mixed_BTHK, sums_BHT = saved
    product_BTHK = grad_BTHK.astype(jnp.float32) * mixed_BTHK.astype(jnp.float32)
    # The kernels leave the 1 / (1 - rate) of the kept weights to the end, so it is taken off here.
    means_BHT = jnp.sum(product_BTHK, axis=-1).swapaxes(1, 2) * (1 - how.rate)
    like = [(qkv_BTCHK.shape, qkv_BTCHK.dtype)]
    args = lengths_B, bits_BHT, qkv_BTCHK, grad_BTHK, sums_BHT, means_BHT
    (grads_BTCHK,) = _call(_key_gradients, how, how.for_keys, how.for_keys.keys, like, *args)
    (grads_BTCHK,) = _call(
        _query_gradients, how, how.for_queries, how.for_queries.queries, like, *args, grads_BTCHK,
        aliased=True,
    )  # fmt: skip
    return grads_BTCHK, None, None


_attend.defvjp(_forward, _backward)


def _call(kernel, how: _How, blocks: Blocks, block: int, like, *args, aliased: bool = False):
    """`kernel` for each block of frames of each head; it sees one head of each array.

    `aliased`: the last argument becomes the result, where the kernel does not write.
    """
    batch, num_frames, _, heads, _ = args[2].shape

    def spec(shape):
        if len(shape) == 1:
            return pl.BlockSpec((None,), lambda _, head, row: (row,))
        if len(shape) == 3:
            return pl.BlockSpec((None, None, shape[2]), lambda _, head, row: (row, head, 0))
        inner = shape[1:-2]  # frames, or frames of query, key and value
        return pl.BlockSpec(
            (None, *inner, None, shape[-1]),
            lambda _, head, row: (row, *(0 for _ in inner), head, 0),
        )

    varying = jax.typeof(args[2]).manual_axis_type  # over which axes of a shard_map
    return pl.pallas_call(
        functools.partial(kernel, how=how, blocks=blocks),
        grid=(pl.cdiv(num_frames, block), heads, batch),
        in_specs=[None if x is None else spec(x.shape) for x in args],
        out_specs=[spec(shape) for shape, _ in like],
        out_shape=[jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in like],
        input_output_aliases={len([x for x in args if x is not None]) - 1: 0} if aliased else {},
        compiler_params=triton.CompilerParams(
            num_warps=blocks.num_warps, num_stages=blocks.num_stages
        ),
        interpret=how.interpret,
        name=kernel.__name__.strip("_"),
    )(*args)


def _mix(length_ref, bits_ref, qkv_ref, mixed_ref, sums_ref, *, how, blocks):
    num_frames, _, width = qkv_ref.shape
    queries = _Part(pl.program_id(0), blocks.queries, num_frames)
    length = length_ref[...]
    query_QK = queries.load(qkv_ref, QUERY)
    bits_Q1 = queries.load(bits_ref)[:, None] if how.rate else None
    scale = _log2_scale(width)

    def add(index, carry, *, is_whole: bool):
        mixed_QK, top_Q, sum_Q = carry
        keys = _Part(index, blocks.keys, length)
        logits_QN = triton.dot(query_QK, keys.load(qkv_ref, KEY).T)
        if not is_whole:
            logits_QN = jnp.where(keys.inside[None, :], logits_QN, -jnp.inf)
        new_top_Q = jnp.maximum(top_Q, jnp.max(logits_QN, axis=1) * scale)
        weights_QN = _exp2(logits_QN * scale - new_top_Q[:, None], how)
        shrink_Q = _exp2(top_Q - new_top_Q, how)
        sum_Q = sum_Q * shrink_Q + jnp.sum(weights_QN, axis=1)
        if how.rate:
            # Not jnp.where, which LLVM swaps with the cast: two instructions more a weight.
            keep_QN = _keep(bits_Q1, keys.places[None, :], how.rate)
            weights_QN *= keep_QN.astype(jnp.float32)
        value_NK = keys.load(qkv_ref, VALUE)
        mixed_QK = mixed_QK * shrink_Q[:, None]
        mixed_QK += triton.dot(weights_QN.astype(value_NK.dtype), value_NK)
        return mixed_QK, new_top_Q, sum_Q

    start = (
        jnp.zeros((blocks.queries, width), jnp.float32),
        jnp.full((blocks.queries,), -jnp.inf, jnp.float32),
        jnp.zeros((blocks.queries,), jnp.float32),
    )
    mixed_QK, top_Q, sum_Q = _over_keys(add, start, length, blocks.keys)
    sum_Q = jnp.where(sum_Q == 0, 1.0, sum_Q)  # of a row without frames
    queries.store(mixed_ref, mixed_QK * (1 / ((1 - how.rate) * sum_Q))[:, None])
    queries.store(sums_ref, top_Q + jnp.log2(sum_Q))


def _key_gradients(
    length_ref, bits_ref, qkv_ref, grad_ref, sums_ref, means_ref, grads_ref, *, how, blocks
):  # fmt: skip
    """Keys come first here, so that the weights are ready to be multiplied by what queries have.

    Neither queries beyond T nor keys beyond the length need a mask: the former are loaded as zeros,
    with gradients that are zero; what the latter get is in rows of their own, and not kept.
    """
    num_frames, _, width = qkv_ref.shape
    keys = _Part(pl.program_id(0), blocks.keys, length_ref[...])
    key_NK = keys.load(qkv_ref, KEY)
    value_NK = keys.load(qkv_ref, VALUE)
    scale = _log2_scale(width)

    def add(index, carry):
        key_grad_NK, value_grad_NK = carry
        queries = _Part(index, blocks.queries, num_frames)
        query_QK = queries.load(qkv_ref, QUERY)
        grad_QK = queries.load(grad_ref)
        logits_NQ = triton.dot(key_NK, query_QK.T)
        weights_NQ = _exp2(logits_NQ * scale - queries.load(sums_ref)[None, :], how)
        kept_NQ = weights_NQ
        if how.rate:
            keep_NQ = _keep(queries.load(bits_ref)[None, :], keys.places[:, None], how.rate)
            kept_NQ = jnp.where(keep_NQ, weights_NQ, 0.0)
        value_grad_NK += triton.dot(kept_NQ.astype(grad_QK.dtype), grad_QK)
        slope_NQ = kept_NQ * triton.dot(value_NK, grad_QK.T)
        slope_NQ -= weights_NQ * queries.load(means_ref)[None, :]
        key_grad_NK += triton.dot(slope_NQ.astype(query_QK.dtype), query_QK)
        return key_grad_NK, value_grad_NK

    zeros_NK = jnp.zeros((blocks.keys, width), jnp.float32)
    # Not jnp.where: of two numbers, Pallas makes a select of two booleans, which Triton refuses.
    num_blocks = (keys.start < keys.end).astype(jnp.int32) * pl.cdiv(num_frames, blocks.queries)
    key_grad_NK, value_grad_NK = jax.lax.fori_loop(0, num_blocks, add, (zeros_NK, zeros_NK))
    inside_N1 = keys.inside[:, None]
    key_grad_NK = jnp.where(inside_N1, key_grad_NK * (width**-0.5 / (1 - how.rate)), 0.0)
    value_grad_NK = jnp.where(inside_N1, value_grad_NK * (1 / (1 - how.rate)), 0.0)
    whole = _Part(pl.program_id(0), blocks.keys, num_frames)
    whole.store(grads_ref, key_grad_NK, KEY)
    whole.store(grads_ref, value_grad_NK, VALUE)


def _query_gradients(
    length_ref, bits_ref, qkv_ref, grad_ref, sums_ref, means_ref, _, grads_ref, *, how, blocks
):  # fmt: skip
    num_frames, _, width = qkv_ref.shape
    queries = _Part(pl.program_id(0), blocks.queries, num_frames)
    length = length_ref[...]
    query_QK = queries.load(qkv_ref, QUERY)
    grad_QK = queries.load(grad_ref)
    sums_Q = queries.load(sums_ref)
    means_Q = queries.load(means_ref)
    bits_Q1 = queries.load(bits_ref)[:, None] if how.rate else None
    scale = _log2_scale(width)

    def add(index, query_grad_QK, *, is_whole: bool):
        keys = _Part(index, blocks.keys, length)
        key_NK = keys.load(qkv_ref, KEY)
        logits_QN = triton.dot(query_QK, key_NK.T)
        if not is_whole:
            logits_QN = jnp.where(keys.inside[None, :], logits_QN, -jnp.inf)
        weights_QN = _exp2(logits_QN * scale - sums_Q[:, None], how)
        kept_QN = weights_QN
        if how.rate:
            keep_QN = _keep(bits_Q1, keys.places[None, :], how.rate)
            kept_QN = jnp.where(keep_QN, weights_QN, 0.0)
        slope_QN = kept_QN * triton.dot(grad_QK, keys.load(qkv_ref, VALUE).T)
        slope_QN -= weights_QN * means_Q[:, None]
        return query_grad_QK + triton.dot(slope_QN.astype(key_NK.dtype), key_NK)

    zeros_QK = jnp.zeros((blocks.queries, width), jnp.float32)
    query_grad_QK = _over_keys(add, zeros_QK, length, blocks.keys)
    queries.store(grads_ref, query_grad_QK * (width**-0.5 / (1 - how.rate)), QUERY)


def _over_keys(add, start, length, size: int):
    """Blocks that are whole come first: those ask of no key whether it is there."""
    num_whole = jax.lax.div(length, size)
    num_blocks = jax.lax.div(length + (size - 1), size)
    so_far = jax.lax.fori_loop(0, num_whole, functools.partial(add, is_whole=True), start)
    return jax.lax.fori_loop(num_whole, num_blocks, functools.partial(add, is_whole=False), so_far)


class _Part:
    """The block of `size` frames at `index`, of which those before `end` are there."""

    def __init__(self, index, size: int, end):
        self.start = index * size
        self.end = end
        self.frames = pl.ds(self.start, size)
        self.places = self.start + jnp.arange(size, dtype=jnp.int32)
        self.inside = self.places < end

    def load(self, ref, *which):
        """Zeros for frames that are not there; `which` is QUERY, KEY or VALUE where there are."""
        part = ref.at[self.frames, *which]
        return triton.load(part, mask=self._mask(part), other=jnp.zeros((), ref.dtype))

    def store(self, ref, x, *which):
        part = ref.at[self.frames, *which]
        triton.store(part, x.astype(ref.dtype), mask=self._mask(part))

    def _mask(self, part):
        return self.inside if part.ndim == 1 else self.inside[:, None]


def _keep(bits, places, rate: float):
    """Which weights stay, as layers.dropout has it: bits of the rows and places of the columns."""
    return is_kept(bits, places.astype(jnp.uint32), rate)


def _log2_scale(width: int) -> float:
    """Of the logits, for a softmax in powers of two."""
    return width**-0.5 * math.log2(math.e)


def _exp2(x, how: _How):
    """The GPU's one instruction; not to take results below 2^-126 for 0 would cost three more."""
    if how.interpret:
        return jnp.exp2(x)
    (power,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )  # fmt: skip
    return power
