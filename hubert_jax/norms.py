# SPDX-License-Identifier: Apache-2.0
"""Layer norms for NVIDIA's GPUs, of x or of x + dropout(branch): two Pallas kernels through Triton.

Rows are read once, into registers, and written once; XLA takes three to six kernels each way, some
of them with all rows in float32. Backwards, a norm is made again from the sum that it was made of.

N rows, D width; R rows and W columns of a block, P programs
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from hubert_jax import blocks
from hubert_jax.layers import NORM_EPS, is_kept

ROWS, ROWS_BACK = 4, 2  # of a block, forwards and backwards


class _How(NamedTuple):
    rate: float
    interpret: bool
    is_alone: bool  # no branch


def layer_norm(
    x_ND, scale_D, bias_D, branch_ND=None, bits_N=None, *, rate: float = 0.0,
    interpret: bool = False,
):  # fmt: skip
    """The norm over D of x, or of x + dropout(branch), in x's type; sums are float32.

    `bits_N` are `layers.bits_of_rows` of the branch's rows: with a rate, what `layers.dropout`
    drops is dropped.
    """
    how = _How(rate, interpret, is_alone=branch_ND is None)
    return _layer_norm(how, x_ND, branch_ND, bits_N, scale_D, bias_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(how, x_ND, branch_ND, bits_N, scale_D, bias_D):
    return _normed_and_sum(how, x_ND, branch_ND, bits_N, scale_D, bias_D, num_outputs=1)[0]


def _normed_and_sum(how, x_ND, branch_ND, bits_N, scale_D, bias_D, *, num_outputs: int):
    return blocks.call(
        functools.partial(_normalise, rate=how.rate),
        (pl.cdiv(len(x_ND), ROWS),),
        [x_ND, branch_ND, bits_N, scale_D[None], bias_D[None]],
        [(x_ND.shape, x_ND.dtype)] * num_outputs,
        interpret=how.interpret,
    )


def _forward(how, x_ND, *args):
    normed_ND, *sums = _normed_and_sum(how, x_ND, *args, num_outputs=1 if how.is_alone else 2)
    _, bits_N, scale_D, _ = args
    return normed_ND, ((sums or [x_ND])[0], bits_N, scale_D)


def _backward(how, saved, grad_ND):
    sum_ND, bits_N, scale_D = saved
    num_rows, width = sum_ND.shape
    num_programs = min(blocks.PROGRAMS, pl.cdiv(num_rows, ROWS_BACK))
    drops = not how.is_alone and how.rate > 0
    scales_PD, biases_PD, grad_x_ND, *dropped = blocks.call(
        functools.partial(_norm_gradients, rate=how.rate, num_programs=num_programs),
        (num_programs,),
        [sum_ND, grad_ND, bits_N, scale_D[None]],
        [((num_programs, width), jnp.float32)] * 2
        + [(sum_ND.shape, sum_ND.dtype)] * (2 if drops else 1),
        interpret=how.interpret,
    )
    grad_branch_ND = None if how.is_alone else (dropped or [grad_x_ND])[0]
    return grad_x_ND, grad_branch_ND, None, jnp.sum(scales_PD, 0), jnp.sum(biases_PD, 0)


_layer_norm.defvjp(_forward, _backward)


def _normalise(inputs, outputs, *, rate: float):
    x_ref, branch_ref, bits_ref, scale_ref, bias_ref = inputs
    normed_ref, *sums = outputs
    block = _block(x_ref, ROWS, pl.program_id(0))
    x_RW = block.load(x_ref)
    if branch_ref is not None:
        x_RW += block.load(branch_ref) * _factors(block, bits_ref, rate)
        x_RW = x_RW.astype(x_ref.dtype).astype(jnp.float32)
        if sums:
            block.store(sums[0], x_RW)
    normed_RW, _ = _normed(block, x_RW)
    block.store(normed_ref, normed_RW * block.row(scale_ref) + block.row(bias_ref))


def _norm_gradients(inputs, outputs, *, rate: float, num_programs: int):
    x_ref, grad_ref, bits_ref, scale_ref = inputs
    scales_ref, biases_ref, grad_x_ref, *dropped = outputs
    first = pl.program_id(0)

    def add(turn, sums):
        scale_grad_RW, bias_grad_RW = sums
        block = _block(x_ref, ROWS_BACK, first + turn * num_programs)
        grad_RW = block.load(grad_ref)
        normed_RW, slope_R1 = _normed(block, block.load(x_ref))
        scaled_RW = grad_RW * block.row(scale_ref)
        along_RW = normed_RW * _mean(block, scaled_RW * normed_RW)
        grad_x_RW = (scaled_RW - _mean(block, scaled_RW) - along_RW) * slope_R1
        block.store(grad_x_ref, grad_x_RW)
        if dropped:
            block.store(dropped[0], grad_x_RW * _factors(block, bits_ref, rate))
        return scale_grad_RW + grad_RW * normed_RW, bias_grad_RW + grad_RW

    block = _block(x_ref, ROWS_BACK, first)
    zeros_RW = jnp.zeros(block.inside.shape, jnp.float32)
    turns = blocks.turns(x_ref.shape[0], ROWS_BACK, first, num_programs)
    for ref, sum_RW in zip(
        (scales_ref, biases_ref),
        jax.lax.fori_loop(0, turns, add, (zeros_RW, zeros_RW)),
        strict=True,
    ):
        block.store_row(ref, first, jnp.sum(sum_RW, axis=0))


def _block(ref, rows: int, index) -> blocks.Block:
    return blocks.Block(ref, (rows, pl.next_power_of_2(ref.shape[1])), index)


def _factors(block: blocks.Block, bits_ref, rate: float):
    """Of a branch: 0 for what layers.dropout drops."""
    if not rate:
        return 1.0
    zero = jnp.zeros((), jnp.uint32)
    bits_R = triton.load(bits_ref.at[block.row_R], mask=block.is_row_R, other=zero)
    keep_RW = is_kept(bits_R[:, None], block.column_W.astype(jnp.uint32)[None, :], rate)
    return keep_RW.astype(jnp.float32) * (1 / (1 - rate))


def _mean(block: blocks.Block, x_RW):
    return jnp.sum(x_RW, axis=1, keepdims=True) * (1 / block.width)


def _normed(block: blocks.Block, x_RW):
    """And the reciprocal of what it was divided by: (R, 1)."""
    centred_RW = jnp.where(block.inside, x_RW - _mean(block, x_RW), 0.0)
    slope_R1 = jax.lax.rsqrt(_mean(block, jnp.square(centred_RW)) + NORM_EPS)
    return centred_RW * slope_R1, slope_R1
