# SPDX-License-Identifier: Apache-2.0
"""k-means: no worse than scikit-learn, the same on any number of devices, no cluster empty."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import sharding
from hubert_jax.ops import kmeans, nearest, plus_plus, rows

CONFIG = kmeans.KMeansConfig(
    num_codes=20, seed_rows=1024, num_restarts=3, seed_passes=3, batch_rows=512, max_passes=3,
    patience=20, lloyd_passes=5, lloyd_tolerance=1e-4,
)  # fmt: skip
WIDTH = 8
NUM_ROWS = nearest.CHUNK_ROWS + 905  # of no whole number of chunks


def on_devices(count: int) -> jax.sharding.NamedSharding:
    devices = jax.devices()[:count]
    return sharding.batch_sharding(sharding.make_mesh(data=-1, fsdp=1, tensor=1, devices=devices))


def clusters(num_rows: int, *, num_clusters: int = 40, seed: int = 0) -> np.ndarray:
    """Gaussian clusters that overlap, twice as many as there are codes, in runs like frames."""
    random = np.random.default_rng(seed)
    means = 2.0 * random.standard_normal((num_clusters, WIDTH))
    cluster = random.integers(0, num_clusters, num_rows // 8 + 1).repeat(8)[:num_rows]
    return (means[cluster] + random.standard_normal((num_rows, WIDTH))).astype(np.float32)


def fit(features_ND, *, devices=1, seed=0, num_shards=3, **changes) -> kmeans.KMeans:
    config = dataclasses.replace(CONFIG, **changes)
    shards = np.array_split(features_ND, num_shards)
    return kmeans.fit(shards, config, seed=seed, sharding=on_devices(devices))


def distances(features_ND, centers_CD) -> np.ndarray:
    """The plain definition in float64, N x C."""
    difference_NCD = features_ND[:, None].astype(np.float64) - centers_CD.astype(np.float64)
    return (difference_NCD**2).sum(axis=2)


@pytest.mark.parametrize("seeding_rows", [kmeans.SEEDING_ROWS, 1_000])
def test_inertia_is_no_worse_than_scikit_learns(seeding_rows, monkeypatch):
    """Seeded on the whole sample, and on a third of it."""
    monkeypatch.setattr(kmeans, "SEEDING_ROWS", seeding_rows)
    kmeans._best_seeding.clear_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's own, about numpy
        import threadpoolctl
        from sklearn.cluster import MiniBatchKMeans
    features_ND = clusters(NUM_ROWS)
    theirs = []
    for seed in range(2):
        reference = MiniBatchKMeans(
            CONFIG.num_codes, init="k-means++", max_iter=100, batch_size=500, tol=0.0,
            max_no_improvement=100, n_init=20, reassignment_ratio=0.0, random_state=seed,
        )  # fmt: skip
        with threadpoolctl.threadpool_limits(1):  # its threads wait for each other in loops
            reference.fit(features_ND)
        theirs.append(distances(features_ND, reference.cluster_centers_).min(axis=1).mean())
    ours = [
        fit(features_ND, seed=seed, num_restarts=20, seed_passes=10).inertia for seed in range(4)
    ]
    kmeans._best_seeding.clear_cache()
    assert max(ours) <= np.mean(theirs), (ours, theirs)


def test_what_is_reported_is_what_the_centres_give():
    features_ND = clusters(NUM_ROWS)
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 1e-5)):  # float16 is stored, not used
        stored_ND = features_ND.astype(dtype)
        found = fit(stored_ND)
        distances_NC = distances(stored_ND, found.centers_CD)
        np.testing.assert_allclose(found.inertia, distances_NC.min(axis=1).mean(), rtol=tolerance)
        counts_C = np.bincount(distances_NC.argmin(axis=1), minlength=CONFIG.num_codes)
        assert np.abs(found.counts_C - counts_C).sum() <= 2  # rows half way between two centres
        assert found.counts_C.sum() == NUM_ROWS and found.centers_CD.dtype == np.float32


def test_same_on_one_device_and_on_eight_and_from_any_shards():
    features_ND = clusters(NUM_ROWS)
    one = fit(features_ND, devices=1)
    for other in (fit(features_ND, devices=8), fit(features_ND, num_shards=7)):
        np.testing.assert_allclose(other.centers_CD, one.centers_CD, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(other.inertia, one.inertia, rtol=1e-5)
        assert other.num_batches == one.num_batches and other.num_lloyd_passes > 0
    again = fit(features_ND, devices=1)
    assert np.array_equal(again.centers_CD, one.centers_CD)
    assert not np.allclose(fit(features_ND, seed=1).centers_CD, one.centers_CD, atol=0.1)


@pytest.mark.parametrize("devices", [1, 8])
def test_from_any_state_it_goes_on_to_the_same_bits(devices):
    """A state is what it becomes on disk; empty clusters are filled in the full passes."""
    config = dataclasses.replace(CONFIG, max_passes=3, patience=12, lloyd_passes=3)
    silence_ND = np.full((4000, WIDTH), 30.0, np.float32)
    shards = [np.concatenate([silence_ND, clusters(3 * NUM_ROWS)]), silence_ND]
    fit = functools.partial(kmeans.fit, shards, config, seed=0, sharding=on_devices(devices))
    kept: list[dict[str, np.ndarray]] = []
    whole = fit(keep=lambda state: kept.append(state.arrays()))
    assert all(
        {name: x.dtype.kind for name, x in arrays.items()}.items() <= kmeans.State.KINDS.items()
        for arrays in kept
    )
    phases = {(int(x["num_passes"]), int(x["num_lloyd_passes"])) for x in kept}
    assert len(phases) > 4 and whole.num_batches > config.patience + kmeans.INERTIA_LAG
    for arrays in kept[:: 1 if devices == 1 else 7]:
        again = fit(state=kmeans.State.from_arrays(arrays))
        for a, b in zip(again, whole, strict=True):
            np.testing.assert_array_equal(a, b)
    moved = kmeans.fit(
        shards, config, seed=0, sharding=on_devices(9 - devices),
        state=kmeans.State.from_arrays(kept[len(kept) // 2]),
    )  # fmt: skip
    np.testing.assert_allclose(moved.centers_CD, whole.centers_CD, rtol=1e-4, atol=1e-4)
    assert moved.num_batches == whole.num_batches


def test_lloyd_passes_and_mini_batches_lower_the_inertia():
    features_ND = clusters(NUM_ROWS)
    seeded = fit(features_ND, seed_passes=0, max_passes=0, lloyd_passes=0)
    batched = fit(features_ND, seed_passes=0, max_passes=3, lloyd_passes=0)
    full = fit(features_ND, seed_passes=0, max_passes=0, lloyd_passes=5)
    assert batched.inertia < 0.95 * seeded.inertia and full.inertia < 0.95 * seeded.inertia
    assert (seeded.num_batches, seeded.num_lloyd_passes) == (0, 0)
    num_batches = 3 * -(-NUM_ROWS // CONFIG.batch_rows)
    assert (batched.num_batches, batched.num_lloyd_passes) == (num_batches, 0)
    assert full.num_lloyd_passes == 5
    settled = fit(features_ND, lloyd_passes=50, lloyd_tolerance=0.01)
    assert settled.num_lloyd_passes < 5


def test_the_best_of_many_restarts_goes_on():
    features_ND = clusters(1024)
    inertia = []
    for num_restarts in (1, 20):
        config = dataclasses.replace(CONFIG, num_restarts=num_restarts, seed_passes=0)
        centers_CD, counts_C = kmeans.best_seeding(features_ND, config, np.random.default_rng(0))
        inertia.append(distances(features_ND, centers_CD).min(axis=1).mean())
        assert counts_C.sum() == 1024
    assert inertia[0] > inertia[1]


def test_mini_batches_end_when_the_smoothed_inertia_stays():
    features_ND = clusters(NUM_ROWS)
    found = fit(features_ND, max_passes=200, patience=5)
    assert 5 < found.num_batches < 6 * 200


def test_no_cluster_is_empty_though_most_frames_are_the_same():
    """Digital silence: one frame thousands of times, and few others."""
    silence_ND = np.full((4000, WIDTH), 30.0, np.float32)
    features_ND = np.concatenate([silence_ND, clusters(60), silence_ND])
    found = fit(features_ND, seed_rows=8060, max_passes=1)
    assert (found.counts_C > 0).all()
    assert len(np.unique(found.centers_CD, axis=0)) == CONFIG.num_codes


def test_empty_clusters_are_filled_from_the_sample():
    features_ND = clusters(1024)
    random = np.random.default_rng(0)
    centers_CD = features_ND[random.choice(1024, CONFIG.num_codes, replace=False)]
    kept_C = np.arange(CONFIG.num_codes) % 3 > 0
    filled_CD = kmeans.refill(
        features_ND, np.where(kept_C[:, None], centers_CD, 1e6), kept_C, random
    )
    np.testing.assert_allclose(filled_CD[kept_C], centers_CD[kept_C], atol=1e-5)
    assert (distances(features_ND, np.asarray(filled_CD)).min(axis=0) < 1e-8).all()
    assert len(np.unique(np.asarray(filled_CD).round(3), axis=0)) == CONFIG.num_codes


def test_fit_fills_the_clusters_that_its_seeding_left_empty(monkeypatch):
    features_ND = clusters(NUM_ROWS)
    centers_CD = np.where(np.arange(20)[:, None] < 12, features_ND[::150][:20], 1e3)
    start = centers_CD.astype(np.float32), np.zeros(20, np.int32)
    monkeypatch.setattr(kmeans, "best_seeding", lambda *args: start)
    found = fit(features_ND, max_passes=0, lloyd_passes=0)
    assert (found.counts_C > 0).all() and found.num_lloyd_passes >= 1
    assert found.inertia < 0.8 * distances(features_ND, centers_CD).min(axis=1).mean()


def test_swaps_move_a_centre_to_where_one_is_missing():
    random = np.random.default_rng(0)
    places_CD = 20.0 * random.standard_normal((10, WIDTH))
    features_ND = np.repeat(places_CD, 50, axis=0) + random.standard_normal((500, WIDTH))
    features_ND = features_ND.astype(np.float32)
    twice_CD = np.concatenate([places_CD[:9], places_CD[:1] + 0.1]).astype(np.float32)
    uniform_SL = random.random((8, plus_plus.num_candidates(10)), np.float32)
    before, after = (
        distances(features_ND, np.asarray(centers_CD))
        for centers_CD in (twice_CD, plus_plus.swap(features_ND, twice_CD, uniform_SL))
    )
    assert before.min(axis=1).max() > 100 > after.min(axis=1).max()
    good_CD = places_CD.astype(np.float32)  # nothing to gain: nothing is touched
    np.testing.assert_array_equal(plus_plus.swap(features_ND, good_CD, uniform_SL), good_CD)


def test_far_from_zero_the_digits_are_kept():
    features_ND = clusters(NUM_ROWS)
    near, far = fit(features_ND), fit(features_ND + np.float32(1000.0))
    # The frames themselves lose digits there: float32 has steps of 6e-5 at 1000.
    np.testing.assert_allclose(far.inertia, near.inertia, rtol=0.01)
    codes_N = nearest.assign(jnp.asarray(features_ND + 1000.0), jnp.asarray(far.centers_CD))
    nearest_N = distances(features_ND + np.float32(1000.0), far.centers_CD)
    chosen_N = np.take_along_axis(nearest_N, np.asarray(codes_N)[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen_N, nearest_N.min(axis=1), atol=1e-2)


def test_assign_gives_the_nearest_centre_and_the_first_of_equals():
    features_ND = clusters(500)
    centers_CD = features_ND[::25]
    codes_N = jax.jit(nearest.assign)(features_ND, centers_CD)
    assert codes_N.dtype == jnp.int32
    np.testing.assert_array_equal(codes_N, distances(features_ND, centers_CD).argmin(axis=1))
    twice_CD = np.concatenate([centers_CD, centers_CD])
    np.testing.assert_array_equal(nearest.assign(features_ND, twice_CD), codes_N)


def test_scores_are_those_of_numpy_and_on_cpus_one_product():
    features_ND = clusters(300)
    centers_CD = features_ND[::25]
    lowered = jax.jit(nearest._scores)
    want_CN = 0.5 * np.sum(centers_CD**2, axis=1)[:, None] - centers_CD @ features_ND.T
    np.testing.assert_allclose(
        lowered(features_ND, centers_CD), want_CN, rtol=0, atol=1e-6 * np.abs(want_CN).max()
    )
    traced = lowered.trace(features_ND, centers_CD)
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.subtract" in text) == (platform != "cpu")


def test_scatter_and_matmul_sum_alike():
    features_ND, codes_N = clusters(300), jnp.arange(300) % 7
    lowered = jax.jit(nearest._sum_by_code, static_argnames="num_codes")
    sums_CD = lowered(features_ND, codes_N, num_codes=7)
    want_CD = np.stack([features_ND[code::7].sum(axis=0) for code in range(7)])
    np.testing.assert_allclose(sums_CD, want_CD, rtol=1e-5, atol=1e-4)
    traced = lowered.trace(features_ND, codes_N, num_codes=7)
    on_cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "scatter" in on_cpu and "scatter" not in on_cuda and "dot_general" in on_cuda


def test_too_few_frames_are_an_error_with_the_numbers():
    with pytest.raises(ValueError, match=r"20 codes for 19 frames.*features\.sample_share"):
        fit(clusters(19))
    with pytest.raises(ValueError, match=r"\d+ of 20 clusters stay empty.*100 frames"):
        fit(np.repeat(clusters(10), 10, axis=0))
    assert (fit(clusters(20)).counts_C == 1).all()
    for field, value in (("seed_rows", 19), ("num_codes", 0), ("patience", 0), ("max_passes", -1)):
        with pytest.raises(ValueError, match=rf"kmeans\.{field}"):
            dataclasses.replace(CONFIG, **{field: value})


def test_seeding_prefers_candidates_that_are_far():
    """Three tight groups, one of them 100 times as large: three centres, one in each."""
    random = np.random.default_rng(0)
    groups = [(5000, 0.0), (50, 20.0), (50, -20.0)]
    features_ND = np.concatenate(
        [place + random.standard_normal((count, WIDTH)) for count, place in groups]
    ).astype(np.float32)
    centers_RCD = plus_plus.seed(features_ND, plus_plus.draws(random, num_codes=3, num_restarts=5))
    assert np.array_equal(np.sort(np.round(centers_RCD.mean(axis=2) / 20)), [[-1, 0, 1]] * 5)
    assert len(np.unique(np.asarray(centers_RCD)[:, :, 0])) > 10  # restarts differ
    rows_of_sample = {row.tobytes() for row in features_ND.round(3)}
    assert all(row.tobytes() in rows_of_sample for row in np.concatenate(centers_RCD).round(3))


@pytest.mark.parametrize("devices", [1, 8])
def test_batches_hold_every_row_once(devices, tmp_path):
    features_ND = np.arange(2 * 1000, dtype=np.float32).reshape(1000, 2)
    for number, part in enumerate(np.split(features_ND, [10, 10, 700])):  # the second is empty
        np.save(tmp_path / f"{number}.npy", part)
    names = [tmp_path / f"{number}.npy" for number in (0, 2, 3)]
    shards = [np.load(name, mmap_mode="r") for name in names]
    shards.insert(1, np.load(tmp_path / "1.npy"))
    reader = rows.Reader(shards, on_devices(devices))
    for batches in (reader.in_order(300), reader.shuffled(300, np.random.default_rng(0))):
        found = list(batches)
        assert all(batch.features_ND.shape == (288, 2) for batch in found)
        assert all(len(batch.features_ND.sharding.device_set) == devices for batch in found)
        valid = [np.asarray(batch.features_ND)[: batch.num_rows] for batch in found]
        filling = [np.asarray(batch.features_ND)[batch.num_rows :] for batch in found]
        assert sorted(np.concatenate(valid)[:, 0].tolist()) == features_ND[:, 0].tolist()
        assert not np.concatenate(filling).any()
    assert not np.array_equal(np.concatenate(valid), features_ND)
    sample_ND = reader.sample(100, np.random.default_rng(0))
    assert len(np.unique(sample_ND[:, 0])) == 100


def test_reading_ahead_is_bounded(monkeypatch):
    """The whole store is never in memory: few batches are read before they are asked for."""
    reads = []
    original = rows.Reader._read
    monkeypatch.setattr(
        rows.Reader, "_read", lambda self, *args: reads.append(1) or original(self, *args)
    )
    batches = rows.Reader([np.zeros((10_000, 2), np.float16)], on_devices(1)).in_order(320)
    next(batches)
    batches.close()
    assert 1 <= len(reads) <= rows.READ_AHEAD + 1
