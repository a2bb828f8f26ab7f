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
from hubert_jax.data import arrays, cards
from hubert_jax.data.corpus import Corpus, Split
from hubert_jax.ops import kmeans, scores

MAX_CODES = np.iinfo(np.int16).max + 1  # labels are stored as int16


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Labels every split with the one codebook and prints the scores, or says that it is done.

    Raises ValueError when the codebook was made from other features than the config names, or when
    there are labels here that were made from something else.
    """
    settings = extract.FeaturesConfig(**config.features)
    corpus = Corpus(workdir / "corpus")
    mesh = extract.local_mesh()
    source = extract.load_source(settings, workdir, mesh)
    codebook_path = workdir / config.iteration / "codebook.npz"
    centers_CD = jax.device_put(
        read_codebook(codebook_path, source, num_codes=config.kmeans.num_codes),
        sharding.replicated(mesh),
    )
    codebook = cards.digest(codebook_path)

    extractor = extract.Extractor(
        source, extract.num_samples(corpus), batch_seconds=settings.batch_seconds, mesh=mesh
    )
    for name in corpus.splits:
        split, folder = corpus.split(name), workdir / config.iteration / "labels" / name
        made_from = {
            "corpus": corpus.card["fingerprint"],
            "split": name,
            "source": source.facts,
            "codebook": codebook,
        }
        if cards.is_made(folder / "card.json", made_from):
            logs.info(f"{folder}: done before")
        else:
            extract.write_store(
                extractor,
                split,
                np.arange(len(split.ids)),
                folder,
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
                    results, split=split, hop=source.hop, num_codes=len(centers_CD)
                ),
            )
        logs.info(summary(name, cards.read(folder / "card.json")))


def read_codebook(path: epath.Path, source: extract.Source, *, num_codes: int) -> np.ndarray:
    """The centres of a codebook that was made from features of `source`: float32 (C, D).

    Raises FileNotFoundError where there is none, ValueError naming what does not fit.
    """
    card_path = path.with_suffix(".json")
    if not path.exists() or not card_path.exists():
        raise FileNotFoundError(f"{path}: no codebook; run hubert cluster first")
    card = cards.read(card_path)
    cards.require(card_path, card, kind="codebook", source=source.facts, num_codes=num_codes)
    with np.load(path) as codebook:
        centers_CD = codebook["centers_CD"].astype(np.float32)
    if centers_CD.shape != (num_codes, source.width):
        raise ValueError(
            f"{path}: centres of shape {centers_CD.shape}, expected {(num_codes, source.width)};"
            " remove it and run hubert cluster again"
        )
    if num_codes > MAX_CODES:
        raise ValueError(f"kmeans.num_codes is {num_codes}; labels can have at most {MAX_CODES}")
    return centers_CD


@jax.jit
def _assign(features_BTD: jax.Array, centers_CD: jax.Array) -> jax.Array:
    batch, num_frames, width = features_BTD.shape
    codes_N = kmeans.assign(features_BTD.reshape(-1, width), centers_CD)
    return codes_N.reshape(batch, num_frames).astype(np.int16)


def results(store: arrays.Store, *, split: Split, hop: int, num_codes: int) -> cards.Card:
    """For the card: how the codes are used and, where there are phone times, the scores."""
    counts_C = np.zeros(num_codes, np.int64)
    for shard in range(store.num_shards):
        counts_C += np.bincount(store.shard(shard), minlength=num_codes)
    found = score(store, split, hop=hop, num_codes=num_codes)
    return {
        "used_codes": int((counts_C > 0).sum()),
        "perplexity": scores.perplexity(counts_C),
        "scores": None if found is None else found._asdict(),
    }


def score(store: arrays.Store, split: Split, *, hop: int, num_codes: int) -> scores.Scores | None:
    """Labels against the phones of a split; None where no frame of it has a phone."""
    phone_ids: dict[str, int] = {}
    codes, phones = [np.zeros(0, np.int16)], [np.zeros(0, np.int64)]
    for position, id_ in enumerate(split.ids):
        intervals = split.phones(position)
        if intervals is None:
            continue
        codes_T = store[id_]
        phones_I = np.array(
            [phone_ids.setdefault(name, len(phone_ids)) for name in intervals.names], np.int64
        )
        codes.append(codes_T)
        phones.append(
            scores.frame_phones(
                len(codes_T),
                hop=hop,
                starts_I=intervals.starts,
                stops_I=intervals.stops,
                phones_I=phones_I,
            )
        )
    counts_PC = scores.joint_counts(
        np.concatenate(phones),
        np.concatenate(codes),
        num_phones=len(phone_ids),
        num_codes=num_codes,
    )
    return scores.score(counts_PC) if counts_PC.any() else None


def summary(name: str, card: cards.Card) -> str:
    """One line: 'labels validation: 96 of 100 codes used, ... PNMI 0.412, phone purity ...'."""
    line = (
        f"labels {name}: {card['num_rows']} at {card['rate']} Hz, {card['used_codes']} of"
        f" {card['num_codes']} codes used, perplexity {card['perplexity']:.1f}"
    )
    found = card["scores"]
    if found is None:
        return f"{line}; no phone times to score them against"
    return (
        f"{line}; PNMI {found['pnmi']:.3f}, phone purity {found['phone_purity']:.3f}, cluster"
        f" purity {found['cluster_purity']:.3f} on {found['num_frames']} frames of"
        f" {found['num_phones']} phones"
    )
