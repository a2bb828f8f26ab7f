# SPDX-License-Identifier: Apache-2.0
"""k-means in the bench: a fit and its parts, ours beside scikit-learn and faiss.

N rows, D width, C codes
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hubert_jax import sharding
from hubert_jax.bench import peers
from hubert_jax.bench.ours import NAME
from hubert_jax.bench.timing import Contender, Work
from hubert_jax.ops import kmeans, nearest, plus_plus, rows

SHARD_ROWS = 500_000  # of generated features; where there are more, they are float16

Found = dict[str, list[np.ndarray]]  # centres of every call, by contender


class Piece(NamedTuple):
    """A fit, or a part of one, and all who do it."""

    name: str
    rows_ND: np.ndarray  # by which centres are judged
    num_rows: int
    contenders: list[Contender]
    found: Found  # filled while they work
    is_whole: bool = False  # a fit

    def rate(self, seconds: float) -> str:
        return f"{self.num_rows / seconds / 1e6:.2f} M frames/s"

    def inertias(self, count: int) -> dict[str, str]:
        """A note for each contender: of its first `count` centres the mean inertia."""
        notes = {}
        for name, centers in self.found.items():
            inertias = [inertia(self.rows_ND, centers_CD) for centers_CD in centers[:count]]
            several = f", mean of {len(inertias)}" if len(inertias) > 1 else ""
            notes[name] = f"inertia {np.mean(inertias):.2f}{several}"
        return notes


def pieces(
    config: kmeans.KMeansConfig, *, num_rows: int, width: int, n_init: int
) -> Iterator[Piece]:
    """A whole fit; seeding, a full pass from such seeds, and assignment to the fit's centres."""
    num_codes = config.num_codes
    shards = clustered(num_rows, width, num_codes)
    rows_ND = shards[0]  # by which centres are judged too: ten million would take a minute
    num_seeding = max(kmeans.SEEDING_ROWS, 32 * num_codes)  # of a restart, as in a fit
    part_ND = rows_ND[:num_seeding].astype(np.float32)

    fitted: Found = {}
    contenders = fits(shards, config, fitted, n_init=n_init)
    yield Piece("k-means", rows_ND, num_rows, contenders, fitted, is_whole=True)

    seeded: Found = {}
    contenders = seedings(part_ND, num_codes, seeded)
    yield Piece("seeding", part_ND, len(part_ND), contenders, seeded)

    first_CD = seeds(part_ND, num_codes, np.random.default_rng(0))
    moved: Found = {}
    contenders = full_passes(shards, first_CD, moved)
    yield Piece("full pass", rows_ND, num_rows, contenders, moved)

    nearest_CD = fitted.get(NAME, [first_CD])[0]
    contenders = assignments(rows_ND, nearest_CD)
    yield Piece("assignment", rows_ND, len(rows_ND), contenders, {})


def fits(
    shards: Sequence[np.ndarray], config: kmeans.KMeansConfig, found: Found, *, n_init: int
) -> list[Contender]:
    """Codebooks; scikit-learn's with the reference's arguments but for n_init."""
    name = f"scikit-learn, n_init {n_init}"
    sharded = sharding.batch_sharding(sharding.make_mesh(data=-1, fsdp=1, tensor=1))

    def ours() -> Work:
        def work():
            found[NAME] = [kmeans.fit(shards, config, seed=0, sharding=sharded).centers_CD]

        return work

    def of_sklearn() -> Work:
        from sklearn.cluster import MiniBatchKMeans

        features_ND = np.concatenate(shards)

        def work():
            model = MiniBatchKMeans(
                n_clusters=config.num_codes, init="k-means++", max_iter=100, batch_size=10_000,
                tol=0.0, max_no_improvement=100, n_init=n_init, reassignment_ratio=0.0,
                random_state=0, compute_labels=False,
            )  # fmt: skip
            model.fit(features_ND)
            found[name] = [model.cluster_centers_]

        return work

    return [Contender(NAME, ours), *_if_installed("sklearn", Contender(name, of_sklearn))]


def seedings(rows_ND, num_codes: int, found: Found) -> list[Contender]:
    """One restart of k-means++ over all these rows; every call draws anew and adds to `found`.

    Of candidates scikit-learn tries 2 + ln(C), ours log2.
    """

    def ours() -> Work:
        random, drawn = np.random.default_rng(0), found.setdefault(NAME, [])
        return lambda: drawn.append(seeds(rows_ND, num_codes, random))

    def of_sklearn() -> Work:
        from sklearn.cluster import kmeans_plusplus

        random, drawn = np.random.RandomState(0), found.setdefault("scikit-learn", [])
        return lambda: drawn.append(kmeans_plusplus(rows_ND, num_codes, random_state=random)[0])

    tried, theirs = plus_plus.num_candidates(num_codes), 2 + int(math.log(num_codes))
    peer = Contender("scikit-learn", of_sklearn, f"{theirs} candidates a centre")
    return [
        Contender(NAME, ours, f"{tried} candidates a centre"),
        *_if_installed("sklearn", peer),
    ]


def seeds(rows_ND, num_codes: int, random: np.random.Generator) -> np.ndarray:
    uniform_C1L = plus_plus.draws(random, num_codes=num_codes, num_restarts=1)
    return np.asarray(jax.jit(plus_plus.seed)(rows_ND, uniform_C1L)[0])


def full_passes(shards: Sequence[np.ndarray], centers_CD, found: Found) -> list[Contender]:
    """One of Lloyd's over all rows from given centres, with their inertia."""

    def ours() -> Work:
        mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
        reader = rows.Reader(shards, sharding.batch_sharding(mesh))

        def work():
            placed_CD = reader.replicate(centers_CD)
            sums = kmeans.full_pass(reader, kmeans.State(placed_CD, np.zeros(0), ""))
            found[NAME] = [np.asarray(nearest.means(sums, placed_CD))]

        return work

    def of_sklearn() -> Work:
        from sklearn.cluster import KMeans

        rows_ND = np.concatenate(shards, dtype=np.float32)

        def work():
            model = KMeans(
                len(centers_CD), init=centers_CD, n_init=1, max_iter=1, algorithm="lloyd"
            )
            found["scikit-learn"] = [model.fit(rows_ND).cluster_centers_]

        return work

    def of_faiss() -> Work:
        import faiss

        rows_ND = np.concatenate(shards, dtype=np.float32)
        num_codes, width = centers_CD.shape

        def work():
            model = faiss.Kmeans(width, num_codes, niter=1, max_points_per_centroid=len(rows_ND))
            model.train(rows_ND, init_centroids=centers_CD)
            found["faiss"] = [np.asarray(model.centroids)]

        return work

    note = "with the mean taken off before and a second assignment after"
    return [
        Contender(NAME, ours),
        *_if_installed("sklearn", Contender("scikit-learn", of_sklearn, note)),
        *_if_installed("faiss", Contender("faiss", of_faiss)),
    ]


def assignments(rows_ND, centers_CD) -> list[Contender]:
    """The nearest centre of every row; faiss by its exact search."""

    def ours() -> Work:
        assign = jax.jit(nearest.assign)
        return lambda: np.asarray(assign(rows_ND, centers_CD))

    def of_faiss() -> Work:
        import faiss

        index = faiss.IndexFlatL2(centers_CD.shape[1])
        index.add(centers_CD)
        return lambda: index.search(rows_ND, 1)

    return [Contender(NAME, ours), *_if_installed("faiss", Contender("faiss", of_faiss))]


def _if_installed(package: str, contender: Contender) -> list[Contender]:
    return [contender] if peers.installed(package) else []


def inertia(features_ND, centers_CD) -> float:
    """Mean squared distance of a row to its nearest centre, in float64 from float32 distances."""
    codes_N = np.asarray(jax.jit(nearest.assign)(features_ND, centers_CD))
    return float(np.mean(np.sum(np.square(features_ND - centers_CD[codes_N], dtype=float), axis=1)))


def clustered(num_rows: int, width: int, num_codes: int) -> list[np.ndarray]:
    """Shards of rows around three times as many centres as are asked for, of unequal sizes.

    One shard is drawn by numpy, the same everywhere; more are drawn on the device, in seconds.
    """
    rng = np.random.default_rng(0)
    centers_CD = 2 * rng.standard_normal((3 * num_codes, width), np.float32)
    shares_C = rng.dirichlet(np.full(len(centers_CD), 0.5))
    if num_rows <= SHARD_ROWS:
        noise_ND = rng.standard_normal((num_rows, width), np.float32)
        return [centers_CD[rng.choice(len(centers_CD), num_rows, p=shares_C)] + noise_ND]

    @functools.partial(jax.jit, static_argnums=1)
    def around(codes_N, num_rows, key):
        noise_ND = jax.random.normal(key, (num_rows, width))
        return (jnp.asarray(centers_CD)[codes_N] + noise_ND).astype(jnp.float16)

    shards = []
    for first in range(0, num_rows, SHARD_ROWS):
        size = min(SHARD_ROWS, num_rows - first)
        codes_N = rng.choice(len(centers_CD), size, p=shares_C)
        shards.append(np.asarray(around(codes_N, size, jax.random.key(first))))
    return shards
