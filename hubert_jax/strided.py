# SPDX-License-Identifier: Apache-2.0
"""Strided convolutions over time and their gradients, for NVIDIA's GPUs: Pallas kernels in Triton.

A frame sees the taps side by side, in memory as in a row of a matrix: with x and kernel read as
x[frame * stride * C + j] and kernel[j, d], j < K C, a convolution is a product whose rows overlap.
Here they are read where they lie; as matrices for cuBLAS, all three would be copied first.

B batch, T frames of x, C channels, D channels of the output, K taps, S frames of the output;
M rows, N columns and J depth of what a kernel multiplies at a time
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton


class Tiles(NamedTuple):
    """What one program of a kernel computes, powers of two, and what it asks of Triton."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


FOR_OUTPUT = Tiles(rows=128, columns=256, depth=64, num_warps=8, num_stages=3)
FOR_INPUT = Tiles(rows=256, columns=128, depth=64, num_warps=8, num_stages=3)
FOR_KERNEL = Tiles(rows=128, columns=256, depth=64, num_warps=8, num_stages=3)


def output(x_BTC, kernel_KCD, *, stride: int, tiles: Tiles = FOR_OUTPUT, interpret: bool = False):
    """The convolution, no padding: (B, T, C) -> (B, (T - K) // stride + 1, D)."""
    batch, num_frames, width = x_BTC.shape
    taps, _, width_out = kernel_KCD.shape
    num_out = (num_frames - taps) // stride + 1
    tiles = _fitted(tiles, width_out)
    grid = (width_out // tiles.columns, pl.cdiv(num_out, tiles.rows), batch)
    step = stride * width

    def kernel(x_ref, kernel_ref, y_ref):
        columns = pl.ds(pl.program_id(0) * tiles.columns, tiles.columns)
        rows = pl.ds(pl.program_id(1) * tiles.rows, tiles.rows)
        place_M = _places(pl.program_id(1), tiles.rows)
        start_M1 = (jnp.minimum(place_M, num_out - 1) * step)[:, None]

        def add(index, sum_MN):
            x_MJ = triton.load(x_ref.at[start_M1 + _places(index, tiles.depth)[None, :]])
            depth = pl.ds(index * tiles.depth, tiles.depth)
            return sum_MN + triton.dot(x_MJ, kernel_ref[depth, columns])

        sum_MN = _sum(add, taps * width // tiles.depth, tiles)
        is_row_M1 = (place_M < num_out)[:, None]
        triton.store(y_ref.at[rows, columns], sum_MN.astype(y_ref.dtype), mask=is_row_M1)

    like = jax.ShapeDtypeStruct((batch, num_out, width_out), x_BTC.dtype)
    args = [_flat(x_BTC), _matrix(kernel_KCD)]
    return _call(kernel, grid, tiles, like, interpret, "conv", args, shared=1)


def input_gradient(
    grad_BSD, kernel_KCD, slope_BTC, *, stride: int, tiles: Tiles = FOR_INPUT,
    interpret: bool = False,
):  # fmt: skip
    """The gradient for x, times `slope_BTC`, that of what made x: (B, S, D) -> (B, T, C)."""
    batch, num_frames, width = slope_BTC.shape
    num_out, width_out = grad_BSD.shape[1:]
    taps, step = len(kernel_KCD), stride * width
    tiles = _fitted(tiles, width)
    grid = (step // tiles.columns, pl.cdiv(pl.cdiv(num_frames, stride), tiles.rows), batch)
    chunks = width_out // tiles.depth

    def kernel(grad_ref, slope_ref, kernel_ref, out_ref):
        first = pl.program_id(0) * tiles.columns  # among the channels of `stride` frames
        phase = jax.lax.div(first, width)
        place_M = _places(pl.program_id(1), tiles.rows)

        place_N = jnp.arange(tiles.columns, dtype=jnp.int32)
        place_MN = place_M[:, None] * step + (first + place_N)[None, :]
        inside_M1 = (place_M * stride + phase < num_frames)[:, None]
        inside_MN = jnp.broadcast_to(inside_M1, place_MN.shape)
        zero = jnp.zeros((), grad_ref.dtype)
        # asked for first, so that it is there when the sum is
        slope_MN = triton.load(slope_ref.at[place_MN], mask=inside_MN, other=zero)

        def add(index, sum_MN):
            run = jax.lax.div(
                index, chunks
            )  # for x[place * stride + phase] tap run * stride + phase
            chunk = index - run * chunks
            row_M = place_M - run
            is_row_M1 = ((row_M >= 0) & (row_M < num_out))[:, None]
            grad_MJ = triton.load(
                grad_ref.at[row_M[:, None] * width_out + _places(chunk, tiles.depth)[None, :]],
                mask=jnp.broadcast_to(is_row_M1, (tiles.rows, tiles.depth)),
                other=zero,
            )
            columns = pl.ds(run * step + first, tiles.columns)
            kernel_NJ = kernel_ref[columns, pl.ds(chunk * tiles.depth, tiles.depth)]
            return sum_MN + triton.dot(grad_MJ, kernel_NJ.T)

        runs = jax.lax.div(taps - phase + stride - 1, stride)
        sum_MN = _sum(add, runs * chunks, tiles)
        # rounded before the product, as where the two are apart
        grad_MN = sum_MN.astype(out_ref.dtype) * slope_MN
        triton.store(out_ref.at[place_MN], grad_MN.astype(out_ref.dtype), mask=inside_MN)

    slope_BX = _flat(slope_BTC)
    like = jax.ShapeDtypeStruct(slope_BX.shape, grad_BSD.dtype)
    args = [_flat(grad_BSD), slope_BX, _matrix(kernel_KCD)]
    grad_BX = _call(kernel, grid, tiles, like, interpret, "conv_input", args, shared=1)
    return grad_BX.reshape(slope_BTC.shape)


def kernel_gradient(
    x_BTC, grad_BSD, *, taps: int, stride: int, tiles: Tiles = FOR_KERNEL, interpret: bool = False
):  # fmt: skip
    """The gradient for the kernel, of each row of the batch: float32 (B, K, C, D)."""
    batch, _, width = x_BTC.shape
    num_out, width_out = grad_BSD.shape[1:]
    tiles = _fitted(tiles, width_out)
    grid = (width_out // tiles.columns, taps * width // tiles.rows, batch)
    step = stride * width

    def kernel(x_ref, grad_ref, out_ref):
        column = pl.ds(pl.program_id(0) * tiles.columns, tiles.columns)
        seen_1M = _places(pl.program_id(1), tiles.rows)[None, :]

        def add(index, sum_MN):
            frame_J = _places(index, tiles.depth)
            x_JM = triton.load(
                x_ref.at[jnp.minimum(frame_J, num_out - 1)[:, None] * step + seen_1M]
            )
            part = grad_ref.at[pl.ds(index * tiles.depth, tiles.depth), column]
            inside_JN = jnp.broadcast_to((frame_J < num_out)[:, None], (tiles.depth, tiles.columns))
            grad_JN = triton.load(part, mask=inside_JN, other=jnp.zeros((), grad_ref.dtype))
            return sum_MN + triton.dot(x_JM.T, grad_JN)

        sum_MN = _sum(add, pl.cdiv(num_out, tiles.depth), tiles)
        triton.store(out_ref.at[pl.ds(pl.program_id(1) * tiles.rows, tiles.rows), column], sum_MN)

    like = jax.ShapeDtypeStruct((batch, taps * width, width_out), jnp.float32)
    args = [_flat(x_BTC), grad_BSD]
    grads = _call(kernel, grid, tiles, like, interpret, "conv_kernel", args, shared=0)
    return grads.reshape(batch, taps, width, width_out)


def _fitted(tiles: Tiles, width: int) -> Tiles:
    """With as many columns as divide `width`."""
    return tiles._replace(columns=math.gcd(tiles.columns, width))


def _places(index, size: int):
    """Of what is in the block of `size` at `index`."""
    return index * size + jnp.arange(size, dtype=jnp.int32)


def _sum(add, count, tiles: Tiles):
    return jax.lax.fori_loop(0, count, add, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))


def _flat(x):
    """Rows of the batch in one run each."""
    return x.reshape(len(x), -1)


def _matrix(kernel_KCD):
    return kernel_KCD.reshape(-1, kernel_KCD.shape[-1])


def _call(kernel, grid, tiles: Tiles, like, interpret: bool, name: str, args, *, shared: int):
    """A row of the batch at a time, the grid's last axis; the last `shared` args are for all."""

    def whole(shape):
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def of_row(shape):
        return pl.BlockSpec((None, *shape[1:]), lambda *at: (at[-1], *(0,) * (len(shape) - 1)))

    num_rows = len(args) - shared
    varying = jax.typeof(args[0]).manual_axis_type  # over which axes of a shard_map
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[(of_row if i < num_rows else whole)(x.shape) for i, x in enumerate(args)],
        out_specs=of_row(like.shape),
        out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype, manual_axis_type=varying),
        compiler_params=triton.CompilerParams(
            num_warps=tiles.num_warps, num_stages=tiles.num_stages
        ),
        interpret=interpret,
        name=name,
    )(*args)
