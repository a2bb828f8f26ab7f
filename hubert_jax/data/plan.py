# SPDX-License-Identifier: Apache-2.0
"""What goes where: the split and the shard of every audio file, before any of it is decoded.

The plan follows from the listings and the configuration alone, so it is the same whenever a run is
started again.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hubert_jax.data.readers import Item, Listing, Source


class PlannedShard(NamedTuple):
    name: str  # SPLIT-NUMBER
    items: list[Item]  # none for the demo corpus, which is not there yet

    @property
    def split(self) -> str:
        return self.name.split("-")[0]


class Task(NamedTuple):
    """Shards that are made together: those of an archive, as it is read in one pass; else one."""

    source: Source
    seconds_per_byte: float  # about
    shards: list[PlannedShard]


class Plan(NamedTuple):
    tasks: list[Task]
    rejected: list[tuple[str, str]]  # id and reason
    num_excluded: int


Chosen = dict[Source, list[Item]]


def plan(
    listings: Mapping[str, Mapping[Source, Listing]],
    *,
    exclude: str,
    validation_share: float,
    num_shards: int,
    seed: int,
) -> Plan:
    """Decides the split and the shard of every item. Raises ValueError.

    `listings` is by split, in the order of the configuration. Items whose id the regular expression
    `exclude` finds are left out. Without a "validation" listing, `validation_share` of the speakers
    of "train" (at least one) become it, drawn by `seed`. "train" gets about `num_shards` shards,
    the other splits as many as their size asks for; every source has its own.
    """
    splits, rejected, num_excluded = _choose(listings, exclude)
    if "validation" not in splits:
        train, validation = _split_by_speaker(splits.pop("train"), validation_share, seed)
        splits = {"train": train, "validation": validation, **splits}
    num_bytes = sum(item.num_bytes for items in splits["train"].values() for item in items)
    tasks: dict[Source, list[PlannedShard]] = {}
    for split, chosen in splits.items():
        number = itertools.count()
        for source, items in chosen.items():
            is_made_here = source.kind == "synth"  # and not listed: one shard, whatever its size
            for run in [items] if is_made_here else _runs(items, num_bytes / num_shards):
                shard = PlannedShard(f"{split}-{next(number):05d}", run)
                tasks.setdefault(source, []).append(shard)
    planned: list[Task] = []
    for source, shards in tasks.items():
        ratio = next(by[source].seconds_per_byte for by in listings.values() if source in by)
        if source.is_archive or source.kind == "synth":
            planned.insert(0, Task(source, ratio, shards))  # first: these take longest
        else:
            planned += [Task(source, ratio, [shard]) for shard in shards]
    return Plan(planned, rejected, num_excluded)


def _choose(
    listings: Mapping[str, Mapping[Source, Listing]], exclude: str
) -> tuple[dict[str, Chosen], list[tuple[str, str]], int]:
    """The items of every split without those excluded, and without the second of equal ids."""
    seen: dict[str, tuple[str, Source, Item]] = {}
    splits: dict[str, Chosen] = {}
    rejected, num_excluded = [], 0
    for split, by_source in listings.items():
        splits[split] = {}
        for source, found in by_source.items():
            chosen = splits[split][source] = []
            for item in found.items:
                if exclude and re.search(exclude, item.id):
                    num_excluded += 1
                elif not _is_text(item.id):
                    rejected.append((item.id, "file name that is not UTF-8"))
                elif item.id not in seen:
                    chosen.append(item)
                    seen[item.id] = (split, source, item)
                else:
                    rejected.append((item.id, _duplicate(item, split, source, *seen[item.id])))
            if found.items and not chosen:
                raise ValueError(
                    f"{source}: none of {len(found.items)} audio files is left for {split} after "
                    f"corpus.exclude={exclude!r}"
                )
    return splits, rejected, num_excluded


def _duplicate(item: Item, split: str, source: Source, *first: Any) -> str:
    """The reason to leave out the second of two files with one id; fatal across sources."""
    first_split, first_source, first_item = first
    if (split, source) == (first_split, first_source):
        return f"duplicate: {first_item.path} has the same id as {item.path}"
    raise ValueError(
        f"utterance {item.id!r} is in {first_source} ({first_split}) and in {source} ({split}). "
        f"An id is the path below the source: give the folder above both as one source, or leave "
        f"one of them out with corpus.exclude"
    )


def _split_by_speaker(train: Chosen, share: float, seed: int) -> tuple[Chosen, Chosen]:
    """`share` of the speakers, at least one, become validation; synth has its own."""
    speakers = sorted({item.speaker for items in train.values() for item in items})
    drawn: set[str] = set()
    if len(speakers) == 1:
        raise ValueError(
            f"corpus.validation is empty and all training audio is of one speaker, {speakers[0]!r}:"
            f" give other audio for validation, or tell speakers apart with corpus.speaker_pattern"
        )
    if speakers:
        num_drawn = min(max(round(share * len(speakers)), 1), len(speakers) - 1)
        order = np.random.default_rng(seed).permutation(len(speakers))
        drawn = {speakers[n] for n in order[:num_drawn]}
    kept: Chosen = {}
    taken: Chosen = {}
    for source, items in train.items():
        kept[source] = [item for item in items if item.speaker not in drawn]
        taken[source] = [item for item in items if item.speaker in drawn]
    return kept, taken


def _runs(items: list[Item], bytes_per_run: float) -> list[list[Item]]:
    """Cuts `items` into runs of about equal bytes, each with at least one."""
    middles = np.cumsum([item.num_bytes for item in items]) - [item.num_bytes / 2 for item in items]
    num_runs = max(round(sum(item.num_bytes for item in items) / max(bytes_per_run, 1.0)), 1)
    total = max(sum(item.num_bytes for item in items), 1)
    run_of = np.minimum((middles / total * num_runs).astype(int), num_runs - 1)
    return [
        [items[n] for n in np.flatnonzero(run_of == run)]
        for run in range(num_runs)
        if (run_of == run).any()
    ]


def _is_text(id_: str) -> bool:
    try:
        id_.encode()
    except UnicodeEncodeError:
        return False
    return True
