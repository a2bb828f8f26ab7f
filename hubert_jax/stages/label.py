# SPDX-License-Identifier: Apache-2.0
"""hubert label: corpus and codebook in, a code for every frame of every utterance out.

Reads WORK/corpus, WORK/<iteration>/codebook.npz and, for kind "layer", a checkpoint; writes
WORK/<iteration>/labels/<split>. Features are computed again and never stored. Where a split has
phone times, its labels are scored against them. Started again, it keeps the shards that are whole.
"""

import functools

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hubert_jax import extract, logs, sharding
from hubert_jax.data import arrays, cards, codebooks, labels
from hubert_jax.data.corpus import Corpus
from hubert_jax.ops import nearest


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Labels every split with the one codebook and prints the scores, or says that it is done.

    Labels that were imported stay as they are; where they came without a codebook, splits that
    have none stay without.

    Raises ValueError when the codebook was made from other features than the config names, or when
    there are labels here that were made from something else.
    """
    settings = extract.FeaturesConfig(**config.features)
    corpus = Corpus(workdir / "corpus")
    folder = workdir / config.iteration
    codebook_path = folder / "codebook.npz"
    todo = [name for name in corpus.splits if not is_imported(folder, name, corpus, config)]
    are_some_imported = len(todo) < len(corpus.splits)
    if not todo or (are_some_imported and not codebook_path.exists()):
        for name in todo:
            logs.info(f"labels {name}: none were imported, and there is no codebook to make them")
        return
    mesh = extract.local_mesh()
    source = extract.load_source(settings, workdir, mesh)
    centers_CD = jax.device_put(
        codebooks.read_matching(
            codebook_path,
            source=source.facts,
            width=source.width,
            num_codes=config.kmeans.num_codes,
        ),
        sharding.replicated(mesh),
    )
    codebook = cards.digest(codebook_path)

    extractor = extract.Extractor(
        source, extract.num_samples(corpus), batch_seconds=settings.batch_seconds, mesh=mesh
    )
    for name in todo:
        split, store = corpus.split(name), folder / "labels" / name
        made_from = {
            "corpus": corpus.card["fingerprint"],
            "split": name,
            "source": source.facts,
            "codebook": codebook,
        }
        if arrays.is_made(store, made_from):
            logs.info(f"{store}: done before")
        else:
            extract.write_store(
                extractor,
                split,
                np.arange(len(split.ids)),
                store,
                title=f"labels {name}",
                finish=functools.partial(_assign, centers_CD=centers_CD),
                width=None,
                dtype="int16",
                num_shards=config.labels.num_shards,
                card=cards.new(
                    "labels",
                    made_from=made_from,
                    corpus=corpus.card["fingerprint"],
                    source=source.facts,
                    codebook=codebook,
                    num_codes=len(centers_CD),
                    rate=source.rate,
                ),
                results=functools.partial(
                    labels.results, split=split, hop=source.hop, num_codes=len(centers_CD)
                ),
            )
        logs.info(labels.summary(name, cards.read(store / "card.json")))


def is_imported(folder: epath.Path, name: str, corpus: Corpus, config: ConfigDict) -> bool:
    """Whether a split's labels were imported; if so, prints what they are.

    Raises ValueError where they are not of this corpus, or not of the codebook beside them.
    """
    path, codebook = folder / "labels" / name / "card.json", folder / "codebook.npz"
    if not cards.is_imported(path):
        return False
    card = cards.read(path)
    expected = {"corpus": corpus.card["fingerprint"], "num_codes": config.kmeans.num_codes}
    if codebook.exists():
        expected["codebook"] = cards.digest(codebook)
    cards.require(path, card, **expected)
    logs.info(f"{path.parent}: imported before\n{labels.summary(name, card)}")
    return True


@jax.jit
def _assign(features_BTD: jax.Array, centers_CD: jax.Array) -> jax.Array:
    batch, num_frames, width = features_BTD.shape
    codes_N = nearest.assign(features_BTD.reshape(-1, width), centers_CD)
    return codes_N.reshape(batch, num_frames).astype(np.int16)
