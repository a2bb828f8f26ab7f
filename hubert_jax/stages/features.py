# SPDX-License-Identifier: Apache-2.0
"""hubert features: corpus in, a sample of the training utterances' features out, for k-means.

Reads WORK/corpus and, for kind "layer", a checkpoint; writes WORK/<iteration>/features. With
features.dump every utterance of every split is stored too, in WORK/<iteration>/features/<split>.
Started again after an interruption, it keeps the shards that are whole.
"""

import functools
import hashlib

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hubert_jax import extract, logs
from hubert_jax.data import arrays, cards
from hubert_jax.data.corpus import Corpus, Split


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Stores the sample (and the dump), or says that it is done.

    Raises ValueError when there are features here that were made from something else.
    """
    settings = extract.FeaturesConfig(**config.features)
    corpus = Corpus(workdir / "corpus")
    folder = workdir / config.iteration / "features"
    mesh = extract.local_mesh()
    source = extract.load_source(settings, workdir, mesh)
    extractor = extract.Extractor(
        source, extract.num_samples(corpus), batch_seconds=settings.batch_seconds, mesh=mesh
    )

    train = corpus.split("train")
    positions = sample(train.ids, share=settings.sample_share, seed=config.seed)
    sampling = {"sample_share": settings.sample_share, "seed": config.seed}
    _store(extractor, settings, corpus, train, positions, folder, sampling)
    if settings.dump:
        for name in corpus.splits:
            split = corpus.split(name)
            positions = np.arange(len(split.ids))
            _store(extractor, settings, corpus, split, positions, folder / name, {})


def sample(ids: list[str], *, share: float, seed: int) -> np.ndarray:
    """Positions of a share of the utterances, at least one, in rising order.

    Chosen by a hash of seed and id: the same ones whatever else is in the corpus or its order.
    """

    def draw(position: int) -> bytes:
        return hashlib.sha256(f"{seed} {ids[position]}".encode()).digest()

    num_chosen = max(1, round(share * len(ids)))
    return np.array(sorted(sorted(range(len(ids)), key=draw)[:num_chosen]))


def _store(
    extractor: extract.Extractor,
    settings: extract.FeaturesConfig,
    corpus: Corpus,
    split: Split,
    positions: np.ndarray,
    folder: epath.Path,
    sampling: dict[str, float],
) -> None:
    source = extractor.source
    made_from = {
        "corpus": corpus.card["fingerprint"],
        "split": split.name,
        "source": source.facts,
        "dtype": settings.dtype,
        **sampling,
    }
    if arrays.is_made(folder, made_from):
        logs.info(f"{folder}: done before, {len(positions)} utterances")
        return
    extract.write_store(
        extractor,
        split,
        positions,
        folder,
        title=f"features {split.name}",
        finish=functools.partial(_as_dtype, dtype=settings.dtype),
        width=source.width,
        dtype=settings.dtype,
        num_shards=settings.num_shards,
        card=cards.new(
            "features",
            made_from=made_from,
            corpus=corpus.card["fingerprint"],
            source=source.facts,
            rate=source.rate,
        ),
    )


@functools.partial(jax.jit, static_argnames="dtype")
def _as_dtype(features_BTD: jax.Array, *, dtype: str) -> jax.Array:
    return features_BTD.astype(dtype)
