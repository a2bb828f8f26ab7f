# SPDX-License-Identifier: Apache-2.0
"""The audio of a corpus: how much, how long, how loud, twice, by whom.

Lengths, speakers and duplicates are of every utterance; loudness of some, drawn evenly.
"""

import collections
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hubert_jax.data import readers
from hubert_jax.data.corpus import SPLITS, Corpus, Split
from hubert_jax.doctor import disk
from hubert_jax.doctor.findings import Finding, graded, look, ok, stop
from hubert_jax.ops import frames

NUM_DECODED = 200  # utterances of a split that are listened to
FULL_SCALE = 0.999
CLIPPED_SHARE = 1e-3  # of the samples of an utterance at full scale: it is clipped
QUIET_DB = -60.0  # windows of 20 ms below this are silence
SILENT_SHARE = 0.7  # of an utterance in silence: mostly silent
AFFECTED_SHARE = 0.05  # of the utterances, above which it is worth a look
LOW_DB = -55.0  # mean level of a split below which its microphone is doubted
MAX_DUPLICATES = 0.001  # share of the utterances
MAX_SPEAKER_SHARE = 0.5  # of the hours
MIN_BYTES_PER_SECOND = 100  # of any codec; what claims less has a header of unknown length


class SplitFacts(NamedTuple):
    """U utterances of a split; N of them decoded."""

    name: str
    num_samples: np.ndarray  # U
    speakers: list[str]  # U
    digests: np.ndarray | None  # U uint64; None: not known, in a corpus of 0.1.0
    clipped: np.ndarray  # N, share of the samples at full scale
    silent: np.ndarray  # N, share of the time in silence
    level_db: np.ndarray  # N


def gather(split: Split, *, num_decoded: int = NUM_DECODED) -> SplitFacts:
    """Raises ValueError where a record is damaged."""
    num = min(num_decoded, len(split))
    positions = np.linspace(0, len(split) - 1, num).astype(int)
    heard = np.array([_listen(split.audio(int(n))) for n in positions]).reshape(-1, 3)
    return SplitFacts(split.name, split.num_samples, split.speakers, split.digests, *heard.T)


def _listen(audio_S: np.ndarray) -> tuple[float, float, float]:
    """(share at full scale, share in silence, level in dB) of an utterance."""
    window = min(frames.HOP, len(audio_S))
    windows = audio_S[: len(audio_S) // window * window].reshape(-1, window).astype(np.float64)
    power = np.mean(windows**2, axis=1)
    silent = np.mean(10 * np.log10(power + 1e-12) < QUIET_DB)
    level = 10 * np.log10(np.mean(power) + 1e-12)
    return float(np.mean(np.abs(audio_S) >= FULL_SCALE)), float(silent), float(level)


class Measured(NamedTuple):
    """About what prepare will read of a source."""

    seconds: float  # NaN: not known
    num_files: int
    num_archives: int


def of_sources(config) -> tuple[list[Finding], dict[str, int] | None]:
    """Of audio that is not yet a corpus: whether it is there, and about how much of it.

    The second value is the samples of a split, about; None: not known. What prepare will take from
    train for validation counts as train.
    """
    try:
        if not config.train:
            raise ValueError("corpus.train is empty: name a folder of audio, or kind:path")
        sources = {name: readers.parse(config[name]) for name in SPLITS}
        if not config.validation:  # synth has its own
            sources["validation"] = [s for s in sources["train"] if s.kind == "synth"]
        measured = {
            name: [_measure(source, name, config) for source in of_split]
            for name, of_split in sources.items()
        }
    except (ValueError, OSError, re.error) as error:
        remedy = "mend corpus.train, .validation or .test"
        return [stop("audio: sources", str(error), remedy)], None
    listed = ", ".join(dict.fromkeys(str(s) for of_split in sources.values() for s in of_split))
    there = ok("audio: sources", f"{listed}; hubert prepare has not run, or not to its end")
    every = [one for of_split in measured.values() for one in of_split]
    counts = {
        "files": sum(one.num_files for one in every),
        "archives": sum(one.num_archives for one in every),
    }
    counted = ", ".join(f"{num} {what}" for what, num in counts.items() if num)
    counted = counted or "hubert prepare makes it"
    seconds = {name: sum(one.seconds for one in of_split) for name, of_split in measured.items()}
    total = sum(seconds.values())
    if np.isnan(total):
        reason = f"not known: the headers that were tried tell no length ({counted})"
        return [there, look("audio: hours", reason, "is it audio? play some of it")], None
    about = f"about {total / 3600:.2f} h ({counted}), an estimate before hubert prepare"
    num_samples = {name: int(num * frames.SAMPLE_RATE) for name, num in seconds.items()}
    return [there, ok("audio: hours", about)], num_samples


def _measure(source: readers.Source, split: str, config) -> Measured:
    """By the headers of some files; of an archive, which holds FLAC, by its size."""
    if source.kind == "synth":
        if split == "test":
            raise ValueError("corpus.test: synth makes train and validation only")
        return Measured(60.0 * config.synth[f"{split}_minutes"], 0, 0)
    if source.is_archive:
        return Measured(os.path.getsize(source.path) / disk.FLAC_BYTES_PER_SECOND, 0, 1)
    items, ratio = readers.listing(source, speaker_pattern=config.speaker_pattern)
    kept = [item for item in items if not (config.exclude and re.search(config.exclude, item.id))]
    if not kept:
        raise ValueError(
            f"{source}: corpus.exclude={config.exclude!r} leaves none of {len(items)} audio files"
        )
    ratio = ratio if 0 < ratio < 1 / MIN_BYTES_PER_SECOND else np.nan
    return Measured(ratio * sum(item.num_bytes for item in kept), len(kept), 0)


def of_corpus(corpus: Corpus) -> list[Finding]:
    """Everything of a finished corpus."""
    try:
        splits = {name: gather(corpus.split(name)) for name in corpus.splits}
    except (ValueError, OSError) as error:
        return [stop("audio: files", str(error), "see above")]
    found = of_card(corpus.card)
    for facts in splits.values():
        found += of_split(facts)
    return found + across(splits)


def of_card(card: Mapping[str, Any]) -> list[Finding]:
    rates = {int(rate): count for rate, count in card["files_by_sample_rate"].items()}
    total = sum(rates.values())
    low = sum(count for rate, count in rates.items() if rate < frames.SAMPLE_RATE)
    listed = ", ".join(f"{count} at {rate} Hz" for rate, count in sorted(rates.items()))
    num_kept = sum(split["utterances"] for split in card["splits"].values())
    num_rejected = card["rejected"]["utterances"]
    reasons = ", ".join(f"{why} {n}" for why, n in card["rejected"]["reasons"].items()) or "none"
    return [
        graded(
            "audio: rates",
            f"files: {listed}",
            "their upper half band is empty, and codes will tell telephone from microphone; leave"
            " them out (corpus.exclude) unless all you care for is such speech",
            is_look=low > AFFECTED_SHARE * total,
        ),
        graded(
            "audio: left out",
            f"{num_rejected} of {num_rejected + num_kept} utterances ({reasons})",
            "read rejected.tsv: is it a kind of file that you need?",
            is_look=num_rejected > AFFECTED_SHARE * (num_rejected + num_kept),
        ),
    ]


def of_split(facts: SplitFacts) -> list[Finding]:
    seconds = facts.num_samples / frames.SAMPLE_RATE
    name, num_heard = f"audio {facts.name}", len(facts.level_db)
    clipped = float(np.mean(facts.clipped > CLIPPED_SHARE))
    silent = float(np.mean(facts.silent > SILENT_SHARE))
    level = float(np.median(facts.level_db))
    duplicates = _duplicates(facts)
    return [
        ok(
            f"{name}: hours",
            f"{len(seconds)} utterances, {seconds.sum() / 3600:.2f} h, {seconds.min():.1f} to"
            f" {seconds.max():.1f} s (median {np.median(seconds):.1f})",
        ),
        graded(
            f"{name}: clipping",
            f"{clipped:.1%} of {num_heard} utterances have more than {CLIPPED_SHARE:.1%} of their"
            " samples at full scale",
            "lower the gain before the conversion to 16 bits; clipped speech is lost speech",
            is_look=clipped > AFFECTED_SHARE,
        ),
        graded(
            f"{name}: silence",
            f"{silent:.1%} of {num_heard} utterances are mostly silent (below {QUIET_DB:.0f} dB"
            f" for more than {SILENT_SHARE:.0%} of their time)",
            "cut silence away, or codes are spent on it",
            is_look=silent > AFFECTED_SHARE,
        ),
        graded(
            f"{name}: level",
            f"{-level:.0f} dB below full scale (median of {num_heard})",
            "so quiet, 16 bits are mostly noise: raise the gain at the source",
            is_look=level < LOW_DB,
        ),
        duplicates,
        *([_speakers(facts)] if facts.name == "train" else []),
    ]


def _duplicates(facts: SplitFacts) -> Finding:
    what = f"audio {facts.name}: duplicates"
    if facts.digests is None:
        return ok(what, "not known: the corpus was made by 0.1.0")
    num = len(facts.digests) - len(np.unique(facts.digests))
    return graded(
        what,
        f"{num} of {len(facts.digests)} utterances have the samples of another one",
        "leave the copies out with corpus.exclude",
        is_look=num > MAX_DUPLICATES * len(facts.digests),
    )


def _speakers(facts: SplitFacts) -> Finding:
    seconds: collections.Counter[str] = collections.Counter()
    for speaker, num_samples in zip(facts.speakers, facts.num_samples.tolist(), strict=True):
        seconds[speaker] += num_samples
    most, largest = seconds.most_common(1)[0]
    share = largest / seconds.total()
    return graded(
        f"audio {facts.name}: speakers",
        f"{len(seconds)}; {most!r} has {share:.0%} of the time",
        "more voices, or less of this one; if it is no speaker, set corpus.speaker_pattern",
        is_look=share > MAX_SPEAKER_SHARE,
    )


def across(splits: Mapping[str, SplitFacts]) -> list[Finding]:
    """What train shares with the splits that should be new to it."""
    found = []
    train = splits["train"]
    for name, facts in splits.items():
        if name == "train":
            continue
        shared = set(train.speakers) & set(facts.speakers)
        found.append(
            graded(
                f"audio {name}: new speakers",
                f"{len(shared)} of its {len(set(facts.speakers))} speakers are in train too",
                "its loss will look too good; split by speaker: leave corpus.validation empty, or"
                " set corpus.speaker_pattern",
                is_look=bool(shared),
            )
        )
        if train.digests is None or facts.digests is None:
            continue
        copies = int(np.isin(facts.digests, train.digests).sum())
        if copies:
            found.append(
                stop(
                    f"audio {name}: new recordings",
                    f"{copies} of its {len(facts.digests)} utterances are in train too",
                    f"leave them out of one of the two, then prepare again: a {name} loss on what"
                    " was trained on says nothing",
                )
            )
        else:
            found.append(ok(f"audio {name}: new recordings", "none of them is in train"))
    return found
