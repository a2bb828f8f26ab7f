# SPDX-License-Identifier: Apache-2.0
"""The labels of a split: whether they belong to the audio, and how their codes are used.

N windows, T frames, C codes
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from hubert_jax.data import arrays, batches, cards, codebooks, labels
from hubert_jax.data.corpus import Corpus
from hubert_jax.doctor.findings import Finding, graded, ok, stop
from hubert_jax.ops import frames, masking, scores

MIN_USED = 0.9  # of the codes
MIN_PERPLEXITY = 0.2  # of the number of codes
MAX_CODE_SHARE = 0.25  # of the frames, in one code
MIN_RUN = 1.25  # frames that a code lasts, in the mean; 1 is what noise has
MAX_RUN = 0.5  # seconds; phones last about 0.08
NUM_WINDOWS = 500  # that copying is tried on


class LabelFacts(NamedTuple):
    name: str
    rate: int
    counts_C: np.ndarray
    num_runs: int  # stretches of one code


def of_iteration(folder: epath.Path, corpus: Corpus) -> list[Finding]:
    """Codebook and labels of WORK/<iteration>, as far as they are made."""
    found: list[Finding] = []
    codebook = folder / "codebook.npz"
    if codebook.exists():
        found.append(_codebook(codebook))
    for name in corpus.splits:
        store = folder / "labels" / name
        what = f"labels {folder.name} {name}"
        if not (store / "card.json").exists():
            found.append(ok(what, "not made yet"))
            continue
        try:
            facts = gather(store, corpus, codebook)
        except (ValueError, OSError, KeyError) as error:
            again = f"remove {store} and run hubert label again"
            found.append(stop(f"{what}: files", str(error), again))
        else:
            found += of_labels(f"labels {folder.name} {name}", facts)
    return found


def _codebook(path: epath.Path) -> Finding:
    what = f"codebook {path.parent.name}"
    try:
        card = codebooks.read_card(path)
        centers_CD = codebooks.read_centers(path)
    except (ValueError, OSError, KeyError) as error:
        return stop(what, str(error), f"remove {path} with its card and run hubert cluster again")
    return graded(
        what,
        f"{len(centers_CD)} codes of {centers_CD.shape[1]} numbers at {card['rate']} Hz",
        f"remove {path} and run hubert cluster again",
        is_stop=not np.isfinite(centers_CD).all(),
    )


def gather(folder: epath.Path, corpus: Corpus, codebook: epath.Path) -> LabelFacts:
    """Compares every length, digest and code. Raises ValueError where labels do not belong here."""
    store = arrays.Store(folder)
    path = folder / "card.json"
    cards.require(path, store.card, kind="labels", corpus=corpus.card["fingerprint"])
    if codebook.exists():
        cards.require(path, store.card, codebook=cards.digest(codebook))
    store.check()
    batches.check_labels(corpus.split(folder.name), store)
    num_codes = int(store.card["num_codes"])
    counts_C, num_runs = np.zeros(num_codes, np.int64), 0
    labels.check_range(store)
    for shard in range(store.num_shards):
        codes = store.shard(shard)
        counts_C += np.bincount(codes, minlength=num_codes)
        num_runs += int(np.count_nonzero(np.diff(codes))) + 1  # a run may cross utterances
    return LabelFacts(folder.name, int(store.card["rate"]), counts_C, num_runs)


class Guesses(NamedTuple):
    """What is reached without any model, on the labels that are trained on."""

    copying: float  # masked accuracy: a masked frame has the code of the nearest visible one
    entropy: float  # loss in nats: every code is as likely as it is frequent


def guesses(folder: epath.Path, config) -> Guesses | None:
    """Of windows of batch.min_seconds, masked as training masks.

    None without labels of whole windows, and where others than the iteration's are trained on.
    """
    if tuple(config.train.labels) not in ((config.iteration,), (str(folder / "labels"),)):
        return None
    try:
        store = arrays.Store(folder / "labels" / "train")
        rate = int(store.card["rate"])
        codes = [store[id_] for id_ in store.ids[:: max(1, len(store.ids) // NUM_WINDOWS)]]
        perplexity = scores.perplexity(np.bincount(np.concatenate(codes)))
    except (ValueError, OSError, KeyError, TypeError):  # of_iteration says what is wrong
        return None
    length = round(config.batch.min_seconds * frames.FRAME_RATE)
    if length < 1 or rate < 1:
        return None
    places = frames.label_positions(length, first_frame=0, label_rate=rate)
    windows = [codes_T[places] for codes_T in codes if len(codes_T) > places[-1]]
    if not windows:
        return None
    codes_NT = np.stack(windows)
    try:
        mask_NT = masking.span_mask(
            jax.random.key(0), *codes_NT.shape,
            prob=config.model.mask_prob, length=config.model.mask_length,
        )  # fmt: skip
    except ValueError:  # too short for a mask: training says so too
        return None
    return Guesses(accuracy_of_copying(codes_NT, np.asarray(mask_NT)), math.log(perplexity))


def accuracy_of_copying(codes_NT: np.ndarray, mask_NT: np.ndarray) -> float:
    """How often a masked frame has the code of the nearest one that is not, the earlier of two."""
    num_frames = codes_NT.shape[1]
    place_T = np.arange(num_frames)
    before_NT = np.maximum.accumulate(np.where(mask_NT, -num_frames, place_T), axis=1)
    seen_NT = np.where(mask_NT, 2 * num_frames, place_T)
    after_NT = np.minimum.accumulate(seen_NT[:, ::-1], axis=1)[:, ::-1]
    nearest_NT = np.where(place_T - before_NT <= after_NT - place_T, before_NT, after_NT)
    copied_NT = np.take_along_axis(codes_NT, nearest_NT, axis=1)
    return float((copied_NT == codes_NT)[mask_NT].mean())


def of_labels(what: str, facts: LabelFacts) -> list[Finding]:
    counts_C = facts.counts_C
    num_codes, num_frames = len(counts_C), int(counts_C.sum())
    used = int(np.count_nonzero(counts_C))
    enough = num_frames >= 20 * num_codes  # a small split cannot use all of many codes
    perplexity = scores.perplexity(counts_C)
    share = counts_C.max() / max(num_frames, 1)
    run = num_frames / max(facts.num_runs, 1) / facts.rate
    again = "were the features of this iteration those of audio? Run hubert cluster again"
    return [
        ok(f"{what}: frames", f"{num_frames}, as many as every utterance's audio has"),
        graded(
            f"{what}: codes",
            f"{used} of {num_codes} used, perplexity {perplexity:.1f}",
            f"codes that nothing has are wasted: lower kmeans.num_codes, or {again}",
            is_look=enough and (used < MIN_USED * num_codes or perplexity < MIN_PERPLEXITY * used),
            is_stop=used < 2,
        ),
        graded(
            f"{what}: one code",
            f"code {int(counts_C.argmax())} has {share:.1%} of the frames",
            "is it silence? Cut it away; else more codes, or " + again,
            is_look=bool(share > max(MAX_CODE_SHARE, 3 / num_codes)),
        ),
        graded(
            f"{what}: runs",
            f"a code lasts {1000 * run:.0f} ms in the mean (phones: about 80)",
            "so short, labels are noise; so long, they hardly follow speech: " + again,
            is_look=run * facts.rate < MIN_RUN or run > MAX_RUN,
        ),
        ok(
            f"{what}: start",
            f"the masked loss starts near ln K = {math.log(num_codes):.2f}, knowing no more than"
            f" how frequent codes are gives {math.log(perplexity):.2f} and an accuracy of"
            f" {share:.3f}",
        ),
    ]
