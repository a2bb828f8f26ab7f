# SPDX-License-Identifier: Apache-2.0
"""hubert cluster: the stored features in, a codebook out.

Reads WORK/<iteration>/features; writes WORK/<iteration>/codebook.npz (centers_CD float32, counts,
inertia) and codebook.json, its card. The features are read shard by shard as the devices need them.
Where the fit stands is kept beside them every KEEP_SECONDS; started again, it goes on from there.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hubert_jax import logs, processes, sharding
from hubert_jax.data import arrays, cards, codebooks
from hubert_jax.ops import kmeans, scores

KEEP_SECONDS = 10.0


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Fits the codebook, or says that it is done, or was imported.

    Raises ValueError when the features are not those that the config names, or when there is a
    codebook here that was made from something else.
    """
    settings = kmeans.KMeansConfig(**config.kmeans)
    folder = workdir / config.iteration
    path = folder / "codebook.npz"
    if cards.is_imported(path.with_suffix(".json")):
        card = codebooks.read_card(path)
        expected = {"num_codes": settings.num_codes, **source_of(config)}
        cards.require(path.with_suffix(".json"), card, **expected)
        logs.info(f"{path}: imported before")
        codebooks.forget_unfinished(folder)
        return
    store = open_features(folder / "features", config)
    made_from = {
        "features": {**store.card["made_from"], "shards": store.card["shards"]},
        "kmeans": dataclasses.asdict(settings),
        "seed": config.seed,
    }
    if cards.is_made(path.with_suffix(".json"), made_from):
        logs.info(f"{path}: done before")
        codebooks.forget_unfinished(folder)
        return

    started = time.monotonic()
    state = unfinished(folder, made_from, shape=(settings.num_codes, store.width))
    codebook = kmeans.fit(
        [store.shard(shard) for shard in range(store.num_shards)],
        settings,
        seed=config.seed,
        sharding=sharding.batch_sharding(sharding.make_mesh(data=-1, fsdp=1, tensor=1)),
        progress=functools.partial(logs.Progress, unit="frames"),
        state=state,
        keep=keeper(folder, made_from),
    )
    seconds = time.monotonic() - started
    if processes.is_first():
        write(path, codebook, store, made_from)
        codebooks.forget_unfinished(folder)
    processes.wait("codebook")  # the next stage reads it
    logs.info(f"{path}: {summary(codebook)}, {seconds:.1f} s")


def open_features(folder: epath.Path, config: ConfigDict) -> arrays.Store:
    """The stored features, after a look at whether they are those that the config names."""
    store = arrays.Store(folder)
    cards.require(
        folder / "card.json",
        store.card,
        kind="features",
        **source_of(config),
        made_from__sample_share=config.features.sample_share,
        made_from__seed=config.seed,
        made_from__dtype=config.features.dtype,
    )
    store.check()
    return store


def source_of(config: ConfigDict) -> dict[str, Any]:
    """What cards say of the features that a config names, but for the checkpoint."""
    features = config.features
    layer = {"source__layer": features.layer} if features.kind == "layer" else {}
    return {"source__kind": features.kind, **layer}


def unfinished(
    folder: epath.Path, made_from: cards.Card, *, shape: tuple[int, int | None]
) -> kmeans.State | None:
    """Where an interrupted fit stands, the same in all processes; None where it begins anew."""
    kinds, may_lack = kmeans.State.KINDS, kmeans.State.MAY_LACK
    state = None
    try:
        arrays = codebooks.read_unfinished(folder, kinds, may_lack=may_lack, made_from=made_from)
        if arrays is not None:
            state = kmeans.State.from_arrays(arrays)
            if state.centers_CD.shape != shape:
                raise ValueError(f"centres of {state.centers_CD.shape}, not {shape}")
    except (ValueError, TypeError, KeyError) as error:
        logs.info(f"{folder / codebooks.UNFINISHED}: {error}; k-means begins anew")
        state = None
    # No one writes it again before all have read it; a shared disk may show them different ones.
    if not processes.agree([-1] if state is None else state.progress()):
        logs.info(f"{folder}: processes see different states; k-means begins anew")
        return None
    if state is None:
        return None
    logs.info(
        f"{folder}: k-means goes on after {state.num_batches} mini-batches and"
        f" {max(state.num_lloyd_passes, 0)} full passes"
    )
    return state


def keeper(folder: epath.Path, made_from: cards.Card) -> Callable[[kmeans.State], None]:
    """Writes the state it is called with, where it is some time since it last did."""
    last = time.monotonic()

    def keep(state: kmeans.State) -> None:
        nonlocal last
        if processes.is_first() and time.monotonic() - last >= KEEP_SECONDS:
            codebooks.keep_unfinished(folder, state.arrays(), made_from=made_from)
            last = time.monotonic()

    return keep


def write(
    path: epath.Path, codebook: kmeans.KMeans, store: arrays.Store, made_from: cards.Card
) -> None:
    """The codebook and its card, which says where the features came from."""
    codebooks.write(
        path,
        codebook.centers_CD,
        made_from=made_from,
        source=store.card["source"],
        rate=store.card["rate"],
        arrays={"counts": codebook.counts_C, "inertia": np.array(codebook.inertia)},
        corpus=store.card["corpus"],
        num_rows=store.num_rows,
        inertia=codebook.inertia,
        used_codes=int(np.sum(codebook.counts_C > 0)),
        perplexity=scores.perplexity(codebook.counts_C),
        num_batches=codebook.num_batches,
        num_lloyd_passes=codebook.num_lloyd_passes,
    )


def summary(codebook: kmeans.KMeans) -> str:
    """'inertia 51.08 per frame over 180000 frames, 100 of 100 codes used, perplexity ...'."""
    counts_C = codebook.counts_C
    return (
        f"inertia {codebook.inertia:.5g} per frame over {counts_C.sum()} frames,"
        f" {np.sum(counts_C > 0)} of {len(counts_C)} codes used,"
        f" perplexity {scores.perplexity(counts_C):.1f};"
        f" {codebook.num_batches} mini-batches, {codebook.num_lloyd_passes} Lloyd passes"
    )
