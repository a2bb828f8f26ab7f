# SPDX-License-Identifier: Apache-2.0
"""hubert cluster: the stored features in, a codebook out.

Reads WORK/<iteration>/features; writes WORK/<iteration>/codebook.npz (centers_CD float32, counts,
inertia) and codebook.json, its card. The features are read shard by shard as the devices need them.
"""

import dataclasses
import functools
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from hubert_jax import logs, sharding
from hubert_jax.data import arrays, cards
from hubert_jax.ops import kmeans, scores


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Fits the codebook, or says that it is done.

    Raises ValueError when the features are not those that the config names, or when there is a
    codebook here that was made from something else.
    """
    settings = kmeans.KMeansConfig(**config.kmeans)
    folder = workdir / config.iteration
    store = open_features(folder / "features", config)
    path = folder / "codebook.npz"
    made_from = {
        "features": {**store.card["made_from"], "shards": store.card["shards"]},
        "kmeans": dataclasses.asdict(settings),
        "seed": config.seed,
    }
    if cards.is_made(path.with_suffix(".json"), made_from):
        logs.info(f"{path}: done before")
        return

    started = time.monotonic()
    codebook = kmeans.fit(
        [store.shard(shard) for shard in range(store.num_shards)],
        settings,
        seed=config.seed,
        sharding=sharding.batch_sharding(sharding.make_mesh(data=-1, fsdp=1, tensor=1)),
        progress=functools.partial(logs.Progress, unit="frames"),
    )
    seconds = time.monotonic() - started
    if jax.process_index() == 0:
        write(path, codebook, store, made_from)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("codebook")  # the next stage reads it
    logs.info(f"{path}: {summary(codebook)}, {seconds:.1f} s")


def open_features(folder: epath.Path, config: ConfigDict) -> arrays.Store:
    """The stored features, after a look at whether they are those that the config names."""
    store = arrays.Store(folder)
    expected = {
        "kind": "features",
        "source__kind": config.features.kind,
        "made_from__sample_share": config.features.sample_share,
        "made_from__seed": config.seed,
        "made_from__dtype": config.features.dtype,
    }
    if config.features.kind == "layer":
        expected["source__layer"] = config.features.layer
    cards.require(folder / "card.json", store.card, **expected)
    return store


def write(
    path: epath.Path, codebook: kmeans.KMeans, store: arrays.Store, made_from: cards.Card
) -> None:
    """The codebook, then its card, which says where the features came from."""
    with cards.whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(
            file,
            centers_CD=codebook.centers_CD,
            counts=codebook.counts_C,
            inertia=np.float64(codebook.inertia),
        )
    card = cards.new(
        "codebook",
        made_from=made_from,
        corpus=store.card["corpus"],
        source=store.card["source"],
        rate=store.card["rate"],
        num_codes=len(codebook.centers_CD),
        width=store.width,
        digest=cards.digest(path),
        num_rows=store.num_rows,
        inertia=codebook.inertia,
        used_codes=int(np.sum(codebook.counts_C > 0)),
        perplexity=scores.perplexity(codebook.counts_C),
        num_batches=codebook.num_batches,
        num_lloyd_passes=codebook.num_lloyd_passes,
    )
    cards.write(path.with_suffix(".json"), card)


def summary(codebook: kmeans.KMeans) -> str:
    """'inertia 51.08 per frame over 180000 frames, 100 of 100 codes used, perplexity ...'."""
    counts_C = codebook.counts_C
    return (
        f"inertia {codebook.inertia:.5g} per frame over {counts_C.sum()} frames,"
        f" {np.sum(counts_C > 0)} of {len(counts_C)} codes used,"
        f" perplexity {scores.perplexity(counts_C):.1f};"
        f" {codebook.num_batches} mini-batches, {codebook.num_lloyd_passes} Lloyd passes"
    )
