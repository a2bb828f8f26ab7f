# SPDX-License-Identifier: Apache-2.0
"""The nearest centre of every row, and the sums of the rows of each centre.

Distances are matmuls over a few thousand rows at a time, so that N x C of them never exist at once.

N rows, D width, E one more, C codes, G groups (chunks) of rows
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

CHUNK_ROWS = 4096  # rows whose distances exist at one time: 1.6 MB at 100 codes, 8 MB at 500
EXACT = jax.lax.Precision.HIGHEST


def assign(features_ND: jax.Array, centers_CD: jax.Array) -> jax.Array:
    """The nearest centre of every row, int32 N; of equally near ones the first.

    On a CPU a chunk at a time, whose distances stay in its cache. Elsewhere, where rows may be
    split over devices, it holds N x C distances: call it on a batch. Under jit.
    """
    offset_D = jnp.mean(centers_CD, axis=0)
    shifted_CD = centers_CD - offset_D

    def nearest(features_ND):
        return _nearest(features_ND.astype(jnp.float32) - offset_D, shifted_CD)[0]

    def nearest_by_chunks(features_ND):
        def assign_chunk(index, codes_N):
            # The last chunk begins early enough to be a whole one.
            start = jnp.minimum(index * CHUNK_ROWS, num_rows - CHUNK_ROWS)
            chunk_ND = jax.lax.dynamic_slice_in_dim(features_ND, start, CHUNK_ROWS)
            return jax.lax.dynamic_update_slice_in_dim(codes_N, nearest(chunk_ND), start, axis=0)

        num_chunks = -(-num_rows // CHUNK_ROWS)
        return jax.lax.fori_loop(0, num_chunks, assign_chunk, jnp.zeros(num_rows, jnp.int32))

    num_rows = len(features_ND)
    if num_rows <= CHUNK_ROWS:
        return nearest(features_ND)
    return jax.lax.platform_dependent(features_ND, cpu=nearest_by_chunks, default=nearest)


class Sums(NamedTuple):
    """What one look at some rows gives: all that either update needs."""

    features_CD: jax.Array  # sum of the rows of each code
    counts_C: jax.Array  # int32
    inertia: jax.Array  # sum of squared distances to the nearest centre


def _nearest(features_ND, centers_CD) -> tuple[jax.Array, jax.Array]:
    """Code of every row, and half of its squared distance less half of its own square."""
    num_codes = len(centers_CD)
    scores_CN = _scores(features_ND, centers_CD)
    least_N = jnp.min(scores_CN, axis=0)

    def compare(scores_CN, least_N):  # a fifth of the time of XLA's argmin on a CPU
        codes_C1 = jnp.arange(num_codes, dtype=jnp.int32)[:, None]
        return jnp.min(jnp.where(scores_CN == least_N, codes_C1, num_codes - 1), axis=0)

    def argmin(scores_CN, least_N):
        return jnp.argmin(scores_CN, axis=0).astype(jnp.int32)

    codes_N = jax.lax.platform_dependent(scores_CN, least_N, cpu=compare, default=argmin)
    return codes_N, least_N


def _scores(features_ND, centers_CD):
    """Half of each centre's square less its product with each row: (C, N)."""

    def subtracted(features_ND, centers_CD, half_squares_C1):
        return half_squares_C1 - jnp.matmul(centers_CD, features_ND.T, precision=EXACT)

    def as_a_column(features_ND, centers_CD, half_squares_C1):
        # Saves a pass over the scores, a fifth at 39 x 100 and nothing at 768 x 500, whose 769
        # columns a TPU would pad.
        centers_CE = jnp.concatenate([-centers_CD, half_squares_C1], axis=1)
        ones_N1 = jnp.ones((len(features_ND), 1), features_ND.dtype)
        features_NE = jnp.concatenate([features_ND, ones_N1], axis=1)
        return jnp.matmul(centers_CE, features_NE.T, precision=EXACT)

    half_squares_C1 = 0.5 * jnp.sum(centers_CD * centers_CD, axis=1, keepdims=True)
    return jax.lax.platform_dependent(
        features_ND, centers_CD, half_squares_C1, cpu=as_a_column, default=subtracted
    )


def code_sums(features_ND, num_valid, centers_CD) -> Sums:
    """Sums over the first `num_valid` rows, a chunk at a time.

    Rows and centres are shifted to the mean of the centres: |x|^2 - 2 x.c + |c|^2 loses its digits
    where all of them lie far from 0.
    """
    num_rows, width = features_ND.shape
    num_chunks = -(-num_rows // CHUNK_ROWS)
    chunk_rows = -(-num_rows // num_chunks)
    filling = num_chunks * chunk_rows - num_rows
    chunks_GND = jnp.pad(features_ND, ((0, filling), (0, 0))).reshape(-1, chunk_rows, width)
    offset_D = jnp.mean(centers_CD, axis=0)
    shifted_CD = centers_CD - offset_D

    def add(total: Sums, chunk):
        first_row, chunk_ND = chunk
        valid_N = first_row + jnp.arange(chunk_rows) < num_valid
        chunk_ND = jnp.where(valid_N[:, None], chunk_ND.astype(jnp.float32) - offset_D, 0.0)
        codes_N, least_N = _nearest(chunk_ND, shifted_CD)
        distances_N = jnp.maximum(jnp.sum(chunk_ND * chunk_ND, axis=1) + 2.0 * least_N, 0.0)
        return Sums(
            total.features_CD + _sum_by_code(chunk_ND, codes_N, num_codes=len(centers_CD)),
            total.counts_C.at[codes_N].add(valid_N.astype(jnp.int32)),
            total.inertia + jnp.sum(jnp.where(valid_N, distances_N, 0.0)),
        ), None

    first_rows_G = jnp.arange(num_chunks) * chunk_rows
    total, _ = jax.lax.scan(add, no_sums(centers_CD), (first_rows_G, chunks_GND))
    shift_CD = total.counts_C[:, None].astype(jnp.float32) * offset_D
    return total._replace(features_CD=total.features_CD + shift_CD)


def _sum_by_code(features_ND, codes_N, *, num_codes: int) -> jax.Array:
    """Sum of the rows of each code: on a CPU a loop over the rows, elsewhere a matmul.

    A scatter is slow on a TPU, and on a GPU its order, and so its rounding, is left to chance.
    """

    def scatter(features_ND, codes_N):
        return jnp.zeros((num_codes, features_ND.shape[1])).at[codes_N].add(features_ND)

    def matmul(features_ND, codes_N):
        chosen_CN = jnp.arange(num_codes)[:, None] == codes_N
        return jnp.matmul(chosen_CN.astype(jnp.float32), features_ND, precision=EXACT)

    return jax.lax.platform_dependent(features_ND, codes_N, cpu=scatter, default=matmul)


def no_sums(centers_CD) -> Sums:
    """Those of no rows at all."""
    num_codes = len(centers_CD)
    return Sums(jnp.zeros(centers_CD.shape), jnp.zeros(num_codes, jnp.int32), jnp.zeros(()))


@jax.jit
def means(sums: Sums, centers_CD) -> jax.Array:
    """The mean of each code's rows; a code without any keeps its centre."""
    counts_C1 = sums.counts_C[:, None]
    return jnp.where(counts_C1 > 0, sums.features_CD / jnp.maximum(counts_C1, 1), centers_CD)


def sharded_code_sums(features_ND, num_valid, centers_CD, *, sharding: NamedSharding) -> Sums:
    """`code_sums` of rows that are split over devices: each its own, then one all-reduce."""
    axes = sharding.spec[0]

    def local(local_ND, num_valid, centers_CD) -> Sums:
        first_row = jax.lax.axis_index(axes) * len(local_ND)
        return jax.lax.psum(code_sums(local_ND, num_valid - first_row, centers_CD), axes)

    in_specs = (sharding.spec, P(), P())
    # check_vma refuses a scan whose total begins equal on all devices and then differs.
    add = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=in_specs, out_specs=P(), check_vma=False
    )
    return add(features_ND, num_valid, centers_CD)
