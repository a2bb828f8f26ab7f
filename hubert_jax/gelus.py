# SPDX-License-Identifier: Apache-2.0
"""GELU for NVIDIA's GPUs: three Pallas kernels through Triton.

All they do is wait for memory. In XLA's loops a thread asks for 8 bytes, and they get about half of
what a GPU has; here it asks for 64. The bias before a GELU is added, and its gradient summed, on
the way.

N rows, D width; R rows and W columns of a block, P programs
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hubert_jax import blocks
from hubert_jax.layers import gelu_and_slope

SIZE, COLUMNS = 4096, 1024  # of a block: its numbers, and its columns at most


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gelu_of_sum(x_ND, bias_D, interpret: bool = False):
    """gelu(x + bias), in x's type."""
    return _forward(x_ND, bias_D, interpret)[0]


def with_slope(x_ND, *, interpret: bool = False):
    """gelu(x) and its slope, in x's type."""
    like = [(x_ND.shape, x_ND.dtype)] * 2
    return blocks.call(_gelu_and_slope, _grid(x_ND), [x_ND], like, interpret=interpret)


def _forward(x_ND, bias_D, interpret: bool):
    like = [(x_ND.shape, x_ND.dtype)]
    args = [x_ND, bias_D[None]]
    (y_ND,) = blocks.call(_gelu_of_sum, _grid(x_ND), args, like, interpret=interpret)
    return y_ND, (x_ND, bias_D)


def _backward(interpret: bool, saved, grad_ND):
    x_ND, bias_D = saved
    num_parts, num_blocks = _grid(x_ND)
    num_programs = min(blocks.PROGRAMS, num_blocks)
    grad_x_ND, sums_PD = blocks.call(
        functools.partial(_gelu_gradient, num_programs=num_programs),
        (num_parts, num_programs),
        [x_ND, bias_D[None], grad_ND],
        [(x_ND.shape, x_ND.dtype), ((num_programs, len(bias_D)), jnp.float32)],
        interpret=interpret,
    )
    return grad_x_ND, jnp.sum(sums_PD, axis=0).astype(bias_D.dtype)


gelu_of_sum.defvjp(_forward, _backward)


def _shape(width: int) -> tuple[int, int]:
    """Of a block: the largest power of two that divides the width, up to COLUMNS."""
    columns = min(COLUMNS, width & -width)
    return SIZE // columns, columns


def _grid(x_ND):
    num_rows, width = x_ND.shape
    rows, columns = _shape(width)
    return width // columns, pl.cdiv(num_rows, rows)


def _gelu_of_sum(inputs, outputs):
    x_ref, bias_ref = inputs
    block = _block(x_ref, pl.program_id(1), pl.program_id(0))
    x_RW = block.load(x_ref) + block.row(bias_ref)
    block.store(outputs[0], gelu_and_slope(x_RW.astype(x_ref.dtype))[0])


def _gelu_and_slope(inputs, outputs):
    (x_ref,) = inputs
    block = _block(x_ref, pl.program_id(1), pl.program_id(0))
    for ref, y_RW in zip(
        outputs, gelu_and_slope(block.load(x_ref).astype(x_ref.dtype)), strict=True
    ):
        block.store(ref, y_RW)


def _gelu_gradient(inputs, outputs, *, num_programs: int):
    x_ref, bias_ref, grad_ref = inputs
    grad_x_ref, sums_ref = outputs
    part, first = pl.program_id(0), pl.program_id(1)
    num_rows, width = x_ref.shape

    def add(turn, sum_RW):
        block = _block(x_ref, first + turn * num_programs, part)
        x_RW = (block.load(x_ref) + block.row(bias_ref)).astype(x_ref.dtype)
        grad_x_RW = block.load(grad_ref) * gelu_and_slope(x_RW)[1].astype(jnp.float32)
        block.store(grad_x_ref, grad_x_RW)
        return sum_RW + grad_x_RW

    shape = _shape(width)
    turns = blocks.turns(num_rows, shape[0], first, num_programs)
    sum_RW = jax.lax.fori_loop(0, turns, add, jnp.zeros(shape, jnp.float32))
    _block(x_ref, first, part).store_row(sums_ref, first, jnp.sum(sum_RW, axis=0))


def _block(ref, row, column) -> blocks.Block:
    return blocks.Block(ref, _shape(ref.shape[1]), row, column)
