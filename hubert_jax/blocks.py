# SPDX-License-Identifier: Apache-2.0
"""Blocks of matrices, for Pallas kernels through Triton that read all of them once.

N rows, D width; R rows and W columns of a block
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PROGRAMS = 1056  # that share the rows where columns are summed: eight for each of an H200's cores


def call(kernel, grid, args, like, *, num_warps: int = 4, interpret: bool = False):
    """`kernel(inputs, outputs)`, lists of whole arrays, for each program of the grid.

    An argument may be None, and so is the input then. `like` are shapes and types of the outputs.
    """
    there = [x for x in args if x is not None]

    def with_nones(*refs):
        given = iter(refs)
        kernel([None if x is None else next(given) for x in args], list(given))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

    varying = jax.typeof(there[0]).manual_axis_type  # over which axes of a shard_map
    out_shape = [jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in like]
    return pl.pallas_call(
        with_nones,
        grid=grid,
        in_specs=[whole(x) for x in there],
        out_specs=[whole(x) for x in out_shape],
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name=getattr(kernel, "func", kernel).__name__.strip("_"),
    )(*there)


class Block:
    """The block of `shape` in `row` and `column` of the blocks of a matrix, or of several alike.

    What it loads is float32, with zeros beyond the matrix, where nothing is stored.
    """

    def __init__(self, ref, shape: tuple[int, int], row, column=0):
        num_rows, self.width = ref.shape
        self.row_R = row * shape[0] + jnp.arange(shape[0], dtype=jnp.int32)
        self.column_W = column * shape[1] + jnp.arange(shape[1], dtype=jnp.int32)
        self.is_row_R = self.row_R < num_rows
        self.is_column_W = self.column_W < self.width
        self.inside = self.is_row_R[:, None] & self.is_column_W[None, :]
        self.at = (
            jnp.broadcast_to(self.row_R[:, None], shape),
            jnp.broadcast_to(self.column_W[None, :], shape),
        )

    def load(self, ref):
        zero = jnp.zeros((), ref.dtype)
        return triton.load(ref.at[*self.at], mask=self.inside, other=zero).astype(jnp.float32)

    def store(self, ref, x_RW):
        triton.store(ref.at[*self.at], x_RW.astype(ref.dtype), mask=self.inside)

    def row(self, ref):
        """The columns of a matrix with a single row: (1, W)."""
        part, zero = ref.at[jnp.zeros_like(self.column_W), self.column_W], jnp.zeros((), ref.dtype)
        return triton.load(part, mask=self.is_column_W, other=zero).astype(jnp.float32)[None, :]

    def store_row(self, ref, index, x_W):
        """As row `index` of a matrix."""
        part = ref.at[jnp.full_like(self.column_W, index), self.column_W]
        triton.store(part, x_W, mask=self.is_column_W)


def turns(num_rows: int, size: int, first, num_programs: int):
    """How many blocks of `size` rows the program `first` does, and each `num_programs` later."""
    return jax.lax.div(pl.cdiv(num_rows, size) - first + num_programs - 1, num_programs)
