# SPDX-License-Identifier: Apache-2.0
"""k-means over more frames than memory holds: seeding on a sample, mini-batches, full passes.

    sample        on a part of it, k-means++ and a few Lloyd passes for every restart; the restart
                  with the lowest inertia goes on with swaps there and as many passes over all
    mini-batches  passes over the shards in random order, every centre with its own learning rate,
                  until the smoothed inertia no longer falls
    full passes   Lloyd: every centre becomes the mean of its frames; no centre is left empty

Distances are matmuls over a few thousand frames at a time. Frames are split over the devices of a
mesh; whatever depends on chance is drawn on the host and seeding runs on one device, so the number
of devices changes nothing but the order of float32 sums. Sources: Sculley (2010) for mini-batches,
scikit-learn's MiniBatchKMeans for when they end.

N rows (frames), D width, C codes, R restarts, G groups (chunks) of rows
"""

import collections
import contextlib
import dataclasses
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hubert_jax.ops import plus_plus, rows

CHUNK_ROWS = 4096  # rows whose distances exist at one time: 1.6 MB at 100 codes, 8 MB at 500
PASS_CHUNKS = 4  # chunks a device that a full pass reads at a time
SEEDING_ROWS = 16_384  # of the sample, or 32 a code if that is more: for restarts and swaps
FORGETTING = 4  # a pass starts with counts / 4: earlier rows went to centres that have moved since
INERTIA_LAG = 4  # mini-batches between a step and the look at its inertia: no wait for the device
MAX_REFILLS = 5  # full passes beyond those asked for, to fill empty clusters
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
    """How a codebook is fitted.

    num_codes: centres.
    seed_rows: frames in the sample, which is held in memory; at least num_codes.
    num_restarts: seedings of the sample, of which the best one goes on.
    seed_passes: Lloyd passes over the sample before the restarts are compared; the best one gets as
        many again, each after a few swaps.
    batch_rows: frames in a mini-batch, over all devices.
    max_passes: mini-batch passes over the store at most.
    patience: mini-batches without a lower smoothed inertia after which they end.
    lloyd_passes: full passes at most, after the mini-batches.
    lloyd_tolerance: full passes end when the last one lowered the inertia by a smaller share.
    """

    num_codes: int
    seed_rows: int
    num_restarts: int
    seed_passes: int
    batch_rows: int
    max_passes: int
    patience: int
    lloyd_passes: int
    lloyd_tolerance: float

    def __post_init__(self):
        for name in ("num_codes", "num_restarts", "batch_rows", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"kmeans.{name} is {getattr(self, name)}; give at least 1")
        for name in ("seed_passes", "max_passes", "lloyd_passes", "lloyd_tolerance"):
            if getattr(self, name) < 0:
                raise ValueError(f"kmeans.{name} is {getattr(self, name)}; give at least 0")
        if self.seed_rows < self.num_codes:
            raise ValueError(
                f"kmeans.seed_rows is {self.seed_rows}, fewer than num_codes {self.num_codes}; "
                "give some tens of rows per code"
            )


class KMeans(NamedTuple):
    """A codebook; inertia and counts are those of these very centres over all rows."""

    centers_CD: np.ndarray  # float32
    counts_C: np.ndarray  # int64, rows of each code: none is 0
    inertia: float  # mean squared distance of a row to its centre
    num_batches: int  # mini-batches done
    num_lloyd_passes: int


StartBar = Callable[[str, int | None], contextlib.AbstractContextManager[Any]]


def _no_bar(title: str, total: int | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext(types.SimpleNamespace(advance=lambda num_rows, note=None: None))


def fit(
    shards: Sequence[np.ndarray],
    config: KMeansConfig,
    *,
    seed: int,
    sharding: NamedSharding,
    progress: StartBar = _no_bar,
) -> KMeans:
    """Fits centres to the rows of `shards`: arrays or memory maps (rows, D) of any float type.

    `sharding` splits the rows of a batch over the devices. In a run of several processes each calls
    this with the same arguments, reads its own rows, and gets the same result. Each phase calls
    `progress(title, total rows or None)` for a context manager with `advance(rows, note=text)`.
    Raises ValueError when there are fewer rows, or fewer distinct rows, than codes.
    """
    reader = rows.Reader(shards, sharding)
    if reader.num_rows < config.num_codes:
        raise ValueError(
            f"{config.num_codes} codes for {reader.num_rows} frames: lower kmeans.num_codes or "
            "store more frames (features.sample_share)"
        )
    random = np.random.default_rng(seed)
    seed_rows = min(config.seed_rows, reader.num_rows)
    with progress("k-means seeding", seed_rows) as bar:
        sample_ND = reader.sample(seed_rows, random)
        centers_CD, counts_C = best_seeding(sample_ND, config, random)
        bar.advance(seed_rows)
    with progress("k-means mini-batches", None) as bar:
        state = reader.replicate((centers_CD, counts_C))
        state, num_batches = _mini_batches(reader, state, config, random, bar=bar)

    centers_CD, inertia = state[0], math.inf
    with progress("k-means full passes", (config.lloyd_passes + 1) * reader.num_rows) as bar:
        for num_lloyd in range(config.lloyd_passes + 1 + MAX_REFILLS):
            before, sums = inertia, _full_pass(reader, centers_CD, bar=bar)
            inertia, counts_C = float(sums.inertia) / reader.num_rows, np.asarray(sums.counts_C)
            settled = inertia >= (1 - config.lloyd_tolerance) * before
            bar.advance(0, note=f"inertia {inertia:.5g}")
            if counts_C.all() and (settled or num_lloyd >= config.lloyd_passes):
                counts_C = counts_C.astype(np.int64)
                return KMeans(np.asarray(centers_CD), counts_C, inertia, num_batches, num_lloyd)
            centers_CD = _means(sums, centers_CD)
            if not counts_C.all():
                centers_CD = refill(sample_ND, np.asarray(centers_CD), counts_C > 0, random)
                centers_CD = reader.replicate(centers_CD)
    raise ValueError(
        f"{np.sum(counts_C == 0)} of {config.num_codes} clusters stay empty: too few of the "
        f"{seed_rows} frames in the sample differ; lower kmeans.num_codes or raise kmeans.seed_rows"
    )


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


# Distances and sums


class Sums(NamedTuple):
    """What one look at some rows gives: all that either update needs."""

    features_CD: jax.Array  # sum of the rows of each code
    counts_C: jax.Array  # int32
    inertia: jax.Array  # sum of squared distances to the nearest centre


def _nearest(features_ND, centers_CD) -> tuple[jax.Array, jax.Array]:
    """Code of every row, and half of its squared distance less half of its own square."""
    num_codes = len(centers_CD)
    half_squares_C = 0.5 * jnp.sum(centers_CD * centers_CD, axis=1)
    scores_CN = half_squares_C[:, None] - jnp.matmul(centers_CD, features_ND.T, precision=EXACT)
    least_N = jnp.min(scores_CN, axis=0)

    def compare(scores_CN, least_N):  # a fifth of the time of XLA's argmin on a CPU
        codes_C1 = jnp.arange(num_codes, dtype=jnp.int32)[:, None]
        return jnp.min(jnp.where(scores_CN == least_N, codes_C1, num_codes - 1), axis=0)

    def argmin(scores_CN, least_N):
        return jnp.argmin(scores_CN, axis=0).astype(jnp.int32)

    codes_N = jax.lax.platform_dependent(scores_CN, least_N, cpu=compare, default=argmin)
    return codes_N, least_N


def _sums(features_ND, num_valid, centers_CD) -> Sums:
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
    total, _ = jax.lax.scan(add, _no_sums(centers_CD), (first_rows_G, chunks_GND))
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


def _no_sums(centers_CD) -> Sums:
    num_codes = len(centers_CD)
    return Sums(jnp.zeros(centers_CD.shape), jnp.zeros(num_codes, jnp.int32), jnp.zeros(()))


@jax.jit
def _means(sums: Sums, centers_CD) -> jax.Array:
    """The mean of each code's rows; a code without any keeps its centre."""
    counts_C1 = sums.counts_C[:, None]
    return jnp.where(counts_C1 > 0, sums.features_CD / jnp.maximum(counts_C1, 1), centers_CD)


def _sharded_sums(features_ND, num_valid, centers_CD, *, sharding: NamedSharding) -> Sums:
    """`_sums` of rows that are split over devices: each its own, then one all-reduce."""
    axes = sharding.spec[0]

    def local(local_ND, num_valid, centers_CD) -> Sums:
        first_row = jax.lax.axis_index(axes) * len(local_ND)
        return jax.lax.psum(_sums(local_ND, num_valid - first_row, centers_CD), axes)

    in_specs = (sharding.spec, P(), P())
    # check_vma refuses a scan whose total begins equal on all devices and then differs.
    add = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=in_specs, out_specs=P(), check_vma=False
    )
    return add(features_ND, num_valid, centers_CD)


# The three phases


def best_seeding(
    sample_ND: np.ndarray, config: KMeansConfig, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centres and their counts of the best restart on the sample. Runs on one device.

    Restarts are seeded and compared on a part of the sample, evenly spread, and swaps are tried
    there; the other passes of the best one go over all of it.
    """
    uniform_CRL = plus_plus.draws(
        random, num_codes=config.num_codes, num_restarts=config.num_restarts
    )
    num_swaps = 4 + config.num_codes // 16  # attempts before a pass: the more codes, the more miss
    shape_GSL = (config.seed_passes, num_swaps, uniform_CRL.shape[2])
    return jax.device_get(
        _best_seeding(sample_ND, uniform_CRL, random.random(shape_GSL, np.float32))
    )


@jax.jit
def _best_seeding(sample_ND, uniform_CRL, uniform_GSL):
    sample_ND = sample_ND.astype(jnp.float32)
    part_ND = sample_ND[:: max(1, len(sample_ND) // max(SEEDING_ROWS, 32 * len(uniform_CRL)))]

    def lloyd(rows_ND, centers_CD):
        return _means(_sums(rows_ND, len(rows_ND), centers_CD), centers_CD)

    def lloyd_on_part(centers_CD, _):
        return lloyd(part_ND, centers_CD), None

    def swap_and_lloyd(centers_CD, uniform_SL):
        return lloyd(sample_ND, plus_plus.swap(part_ND, centers_CD, uniform_SL)), None

    def improve(centers_CD):
        centers_CD, _ = jax.lax.scan(lloyd_on_part, centers_CD, length=len(uniform_GSL))
        return centers_CD, _sums(part_ND, len(part_ND), centers_CD).inertia

    centers_RCD, inertia_R = jax.lax.map(improve, plus_plus.seed(part_ND, uniform_CRL))
    best_CD = centers_RCD[jnp.argmin(inertia_R)]
    best_CD, _ = jax.lax.scan(swap_and_lloyd, best_CD, uniform_GSL)
    return best_CD, _sums(sample_ND, len(sample_ND), best_CD).counts_C


def refill(sample_ND, centers_CD, kept_C, random: np.random.Generator) -> np.ndarray:
    """The centres with those that are not kept chosen anew among the sample. On one device."""
    uniform_C1L = plus_plus.draws(random, num_codes=len(centers_CD), num_restarts=1)
    return jax.device_get(_refill(sample_ND, centers_CD, kept_C, uniform_C1L))


_refill = jax.jit(plus_plus.refill)


def _mini_batches(
    reader: rows.Reader, state, config: KMeansConfig, random: np.random.Generator, *, bar
):
    """State (centres, counts) after the mini-batches, and how many there were."""
    smoothing = min(1.0, 2 * config.batch_rows / (reader.num_rows + 1))  # scikit-learn's
    smoothed, lowest, since_lowest, num_batches = math.nan, math.inf, 0, 0
    pending: collections.deque[tuple[jax.Array, int]] = collections.deque()
    for _ in range(config.max_passes):
        state = (state[0], state[1] // FORGETTING)
        for batch in reader.shuffled(config.batch_rows, random):
            state, inertia = _mini_batch(state, *batch, sharding=reader.sharding)
            num_batches += 1
            bar.advance(batch.num_rows)
            pending.append((inertia, batch.num_rows))
            if len(pending) <= INERTIA_LAG:
                continue
            inertia, num_rows = pending.popleft()
            now = float(inertia) / num_rows
            smoothed = now if math.isnan(smoothed) else smoothed + smoothing * (now - smoothed)
            bar.advance(0, note=f"inertia {smoothed:.5g}")
            since_lowest = 0 if smoothed < lowest else since_lowest + 1
            lowest = min(lowest, smoothed)
            if since_lowest >= config.patience:
                return state, num_batches
    return state, num_batches


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="state")
def _mini_batch(state, features_ND, num_valid, *, sharding: NamedSharding):
    """Every centre becomes the mean of the rows counted for it: its learning rate is 1 / count."""
    centers_CD, counts_C = state
    sums = _sharded_sums(features_ND, num_valid, centers_CD, sharding=sharding)
    counts_C = counts_C + sums.counts_C
    step_CD = sums.features_CD - sums.counts_C[:, None] * centers_CD
    centers_CD = centers_CD + step_CD / jnp.maximum(counts_C, 1)[:, None]
    return (centers_CD, counts_C), sums.inertia


def _full_pass(reader: rows.Reader, centers_CD, *, bar) -> Sums:
    total = reader.replicate(_no_sums(centers_CD))
    for batch in reader.in_order(PASS_CHUNKS * CHUNK_ROWS * reader.num_devices):
        total = _accumulate(total, *batch, centers_CD, sharding=reader.sharding)
        bar.advance(batch.num_rows)
    return total


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="total")
def _accumulate(total, features_ND, num_valid, centers_CD, *, sharding: NamedSharding) -> Sums:
    sums = _sharded_sums(features_ND, num_valid, centers_CD, sharding=sharding)
    return jax.tree.map(jnp.add, total, sums)
