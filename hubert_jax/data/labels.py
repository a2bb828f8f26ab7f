# SPDX-License-Identifier: Apache-2.0
"""What is known of the labels of a split: how the codes are used, and scores where phones are.

For the cards of labels, whether they were made here or imported. T frames, C codes, P phones
"""

import numpy as np

from hubert_jax.data import arrays, cards
from hubert_jax.data.corpus import Split
from hubert_jax.ops import scores


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


def check_range(store: arrays.Store) -> None:
    """Raises ValueError where a label is no code: it would count as a loss without a target."""
    num_codes = store.card["num_codes"]
    for shard in range(store.num_shards):
        labels = store.shard(shard)
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_codes:
            raise ValueError(
                f"{store.folder}: shard {shard} has labels from {labels.min()} to {labels.max()},"
                f" but there are {num_codes} codes; remove the folder and run hubert label again"
            )


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
