# SPDX-License-Identifier: Apache-2.0
"""hubert prepare: audio in, corpus out (a TFDS data set of FLAC at 16 kHz, WORK/corpus).

Files are listed, given a split and a shard, and turned into shards by several processes. What is
unusable is left out and listed with the reason in rejected.tsv. Interrupted and started again, it
goes on with the shards that are missing; nothing is decoded twice.
"""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from hubert_jax import logs, processes
from hubert_jax.data import assembly, audio, cards, corpus, readers, shards, workers
from hubert_jax.data import plan as planning
from hubert_jax.data.readers import Listing, Source
from hubert_jax.ops import frames

UNFINISHED = "unfinished"  # the folder of listings and shards within the corpus' folder


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    train: str  # sources, "kind:path,kind:path"; see data/readers.py
    validation: str  # "" = some speakers of train
    test: str  # scored, and nothing else; "" = none
    validation_share: float  # of the speakers, where validation is ""
    exclude: str  # regular expression; ids in which it is found are left out; "" = none
    speaker_pattern: (
        str  # regular expression whose first group, in an id, is the speaker; "" = rule
    )
    min_seconds: float  # shorter recordings are left out
    max_seconds: float  # longer recordings are cut where they are quiet
    max_rejected: float  # share of utterances that may be unusable
    num_shards: int  # of train, about
    num_workers: int  # processes; 0 = this one alone
    synth: Mapping[str, Any]  # arguments of synth.SynthConfig, where a source is synth

    def __post_init__(self):
        lowest = frames.RECEPTIVE_FIELD / frames.SAMPLE_RATE
        if not lowest <= self.min_seconds <= self.max_seconds / 3 or self.max_seconds < 1:
            raise ValueError(
                f"corpus.min_seconds={self.min_seconds} and max_seconds={self.max_seconds}: it "
                f"takes {lowest} s for one frame, and a piece of a recording that is cut may be as "
                f"short as a third of max_seconds, which must be 1 or more"
            )
        if not self.train:
            raise ValueError("corpus.train is empty: name a folder of audio, or kind:path")
        if not 0 < self.validation_share < 1 or not 0 <= self.max_rejected <= 1:
            raise ValueError(
                f"corpus.validation_share={self.validation_share} and "
                f"max_rejected={self.max_rejected} are shares, between 0 and 1"
            )
        if self.num_shards < 1 or self.num_workers < 0:
            raise ValueError(
                f"corpus.num_shards={self.num_shards} must be 1 or more, "
                f"num_workers={self.num_workers} 0 or more"
            )
        for name in ("exclude", "speaker_pattern"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(
                    f"corpus.{name}={getattr(self, name)!r} is not a regular expression: {error}"
                ) from error

    @property
    def sources(self) -> dict[str, list[Source]]:
        """By split; splits without any are left out."""
        found = {split: readers.parse(getattr(self, split)) for split in corpus.SPLITS}
        if any(source.kind == "synth" for source in found["test"]):
            raise ValueError(f"corpus.test={self.test!r}: synth makes train and validation only")
        return {split: sources for split, sources in found.items() if sources}


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Makes WORK/corpus, or says that it is there. Raises ValueError and OSError."""
    settings = CorpusConfig(**config.corpus.to_dict())
    folder = workdir / "corpus"
    made_from = _made_from(settings, config.seed)
    unfinished = folder / UNFINISHED
    if cards.is_made(folder / "card.json", made_from):
        if unfinished.exists() and processes.is_first():  # killed right after the card was written
            unfinished.rmtree()
        logs.info(f"{folder} is there\n{_table(cards.read(folder / 'card.json'))}")
        return
    sources = settings.sources
    if not cards.is_made(unfinished / "card.json", made_from) and processes.is_first():
        cards.write(unfinished / "card.json", cards.new("corpus", made_from=made_from))
    listings = _list(sources, settings, unfinished)
    plan = planning.plan(
        listings,
        exclude=settings.exclude,
        validation_share=settings.validation_share,
        num_shards=settings.num_shards,
        seed=config.seed,
    )
    _make(plan, settings, unfinished)
    processes.wait("shards")
    if processes.is_first():
        card = cards.new("corpus", made_from=made_from, **_finish(plan, settings, folder))
        cards.write(folder / "card.json", card)
        unfinished.rmtree()
        logs.info(f"{folder} is made\n{_table(card)}")
    processes.wait("corpus")


def _made_from(settings: CorpusConfig, seed: int) -> dict[str, Any]:
    """What decides the content; not the workers, nor how much of it may be unusable."""
    fields = dataclasses.asdict(settings)
    del fields["num_workers"], fields["max_rejected"]
    sources = f"{settings.train},{settings.validation}".split(",")
    if "synth" not in [source.strip() for source in sources]:
        del fields["synth"]
    return {"corpus": fields, "seed": seed}


def _list(
    sources: Mapping[str, Sequence[Source]], settings: CorpusConfig, unfinished: epath.Path
) -> dict[str, dict[Source, Listing]]:
    """What every source has; read once, so that a run that goes on keeps to its plan."""
    unique = list(dict.fromkeys(source for found in sources.values() for source in found))
    paths = {source: unfinished / f"listing-{n:03d}.json" for n, source in enumerate(unique)}
    mine = _share([source for source in unique if source.kind != "synth"])
    to_list = [source for source in mine if not paths[source].exists()]
    archives = [source for source in to_list if source.is_archive]
    folders = [source for source in to_list if not source.is_archive]
    pattern = settings.speaker_pattern
    for source in folders:
        logs.info(f"listing {source}")
        _list_source(source, paths[source], pattern, report=lambda _: None)
    if archives:
        megabytes = sum(epath.Path(source.path).stat().length for source in archives) / 1e6
        with logs.Progress("list archives", megabytes, "MB") as progress:
            workers.run(
                _list_source,
                [(source, paths[source], pattern) for source in archives],
                num_workers=settings.num_workers,
                report=lambda num_bytes: progress.advance(num_bytes / 1e6),
            )
    processes.wait("listings")
    listed = {source: _read_listing(source, paths[source]) for source in unique}
    return {split: {source: listed[source] for source in found} for split, found in sources.items()}


def _share(work: Sequence[Any]) -> Sequence[Any]:
    """What this process does of `work`, which is the same in all of them."""
    index, count = processes.this()
    return work[index::count]


def _list_source(source: Source, path: epath.Path, speaker_pattern: str, *, report) -> None:
    items, ratio = readers.listing(source, speaker_pattern=speaker_pattern, report=report)
    listing = json.dumps({"items": items, "seconds_per_byte": ratio})
    with cards.whole(path) as file:
        file.write_text(json.dumps({"listing": listing, "digest": _digest(listing)}))


def _digest(listing: str) -> str:
    return hashlib.sha256(listing.encode()).hexdigest()


def _read_listing(source: Source, path: epath.Path) -> Listing:
    if source.kind == "synth":
        return Listing([], 0.0)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if _digest(kept["listing"]) != kept["digest"]:
            raise ValueError("its checksum is another")
        listing = json.loads(kept["listing"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged, or of an earlier version ({error}); remove it and run hubert prepare"
            " again"
        ) from error
    items = [readers.Item(*fields) for fields in listing["items"]]
    items = [item._replace(beside=tuple(item.beside)) for item in items]
    return Listing(items, listing["seconds_per_byte"])


def _make(plan: planning.Plan, settings: CorpusConfig, unfinished: epath.Path) -> None:
    limits = shards.Settings(
        min_samples=round(settings.min_seconds * frames.SAMPLE_RATE),
        max_samples=round(settings.max_seconds * frames.SAMPLE_RATE),
        synth=dict(settings.synth),
    )
    total = done = 0.0
    to_make = []
    tasks = _share(plan.tasks)
    for task in tasks:
        total += sum(shards.seconds(task, shard, limits) for shard in task.shards)
        made = [shard for shard in task.shards if shards.is_made(unfinished, shard)]
        done += sum(shards.seconds(task, shard, limits) for shard in made)
        if len(made) < len(task.shards):
            to_make.append((task, unfinished, limits))
    if len(to_make) < len(tasks):
        logs.info(f"going on: {logs.clock(done)} of {logs.clock(total)} of audio are done")
    synth = [task for task in to_make if task[0].source.kind == "synth"]
    others = [task for task in to_make if task[0].source.kind != "synth"]
    with logs.Progress("prepare", total, done=done) as progress:
        # The demo corpus is the same only in a fresh process; one, as it has one task.
        workers.run(shards.make, synth, num_workers=1, report=progress.advance)
        workers.run(shards.make, others, num_workers=settings.num_workers, report=progress.advance)


def _finish(plan: planning.Plan, settings: CorpusConfig, folder: epath.Path) -> dict[str, Any]:
    """Checks what the shards hold and makes them a data set; returns the numbers for the card."""
    made: dict[str, list[assembly.Shard]] = {}
    for name in sorted(shard.name for task in plan.tasks for shard in task.shards):
        made.setdefault(name.split("-")[0], []).append(assembly.Shard(folder / UNFINISHED, name))
    every = [shard for split in made.values() for shard in split]
    rejected = plan.rejected + [row for shard in every for row in shard.rejected]
    reasons = collections.Counter(reason.split(":")[0] for _, reason in rejected)
    _write_rejected(folder / "rejected.tsv", rejected)
    _check(made, rejected, reasons, settings, folder)

    numbers = assembly.assemble(folder, {s: made[s] for s in corpus.SPLITS if s in made})
    rates = collections.Counter(rate for shard in every for rate in shard.sample_rates if rate)
    speakers = {split: {s for shard in made[split] for s in shard.speakers} for split in made}
    return {
        **numbers,
        "rejected": {"utterances": len(rejected), "reasons": dict(reasons)},
        "excluded": plan.num_excluded,
        "files_by_sample_rate": {str(rate): count for rate, count in sorted(rates.items())},
        "speakers_in_train_and_validation": len(speakers["train"] & speakers["validation"]),
    }


def _check(
    made: Mapping[str, Sequence[assembly.Shard]],
    rejected: Sequence[tuple[str, str]],
    reasons: Mapping[str, int],
    settings: CorpusConfig,
    folder: epath.Path,
) -> None:
    ids = collections.Counter(id_ for split in made.values() for s in split for id_ in s.ids)
    total = ids.total() + len(rejected)
    summary = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
    remedy = (
        f"see {folder / 'rejected.tsv'}. To go on with what is made, raise corpus.max_rejected; to "
        f"read mended files, remove {folder / UNFINISHED}"
    )
    if len(rejected) > settings.max_rejected * total:
        raise ValueError(
            f"{len(rejected)} of {total} utterances ({len(rejected) / total:.2%}) are unusable, "
            f"corpus.max_rejected is {settings.max_rejected:.2%}: {summary}; {remedy}"
        )
    for split, found in made.items():
        if not any(len(shard) for shard in found):
            raise ValueError(f"no utterance is left for {split} ({summary}); {remedy}")
    twice = [id_ for id_, count in ids.items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} ids are there twice, {twice[0]!r} for one; a piece of a recording that "
            f"is cut is called ID--0000: rename the file, or leave it out with corpus.exclude"
        )


def _write_rejected(path: epath.Path, rejected: Sequence[tuple[str, str]]) -> None:
    with cards.whole(path) as file:
        lines = ["id\treason"] + [audio.rejected_row(*row) for row in rejected]
        file.write_text("\n".join(lines) + "\n")


def _table(card: Mapping[str, Any]) -> str:
    """The numbers of a corpus as people read them."""
    lines = [f"  {'split':<12}{'utterances':>10}{'speakers':>10}{'hours':>10}{'with phones':>13}"]
    for split in corpus.SPLITS:
        if split in card["splits"]:
            row = card["splits"][split]
            lines.append(
                f"  {split:<12}{row['utterances']:>10}{row['speakers']:>10}{row['hours']:>10.2f}"
                f"{row['with_phones']:>13}"
            )
    rejected = card["rejected"]
    if rejected["utterances"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected["reasons"].items())
        lines.append(f"  left out: {rejected['utterances']} ({reasons}), listed in rejected.tsv")
    if card["excluded"]:
        lines.append(f"  excluded by corpus.exclude: {card['excluded']}")
    for rate, count in card["files_by_sample_rate"].items():
        if int(rate) != frames.SAMPLE_RATE:
            lines.append(f"  resampled from {rate} Hz: {count} files")
    shared = card["speakers_in_train_and_validation"]
    if shared:
        lines.append(f"  {shared} speakers are in train and in validation: losses look too good")
    return "\n".join(lines)
