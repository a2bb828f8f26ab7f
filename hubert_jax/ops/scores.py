# SPDX-License-Identifier: Apache-2.0
"""How well codes agree with phones: phone purity, cluster purity, PNMI.

All three come from the joint counts of phone and code over frames; a frame's phone is the one at
the centre of its receptive field. Source: Hsu et al., 2021, section IV-C, and fairseq's
measure_teacher_quality.py.

T frames, P phones, C codes, I intervals of one utterance
"""

from typing import NamedTuple

import numpy as np

from hubert_jax.ops import frames

NO_PHONE = -1


class Scores(NamedTuple):
    """Agreement of codes with phones, each from 0 to 1."""

    pnmi: float  # I(phone; code) / H(phone): the share of what the phone leaves open that is told
    phone_purity: float  # accuracy when every code is read as its commonest phone
    cluster_purity: float  # accuracy when every phone is read as its commonest code
    num_frames: int  # with a phone
    num_phones: int  # that occur


def score(counts_PC: np.ndarray) -> Scores:
    """Scores of joint counts, which must not all be 0; frames without a phone are not in them.

    PNMI is 1 where all frames have the same phone and nothing is left to tell.
    """
    num_frames = int(counts_PC.sum())
    num_phones = int((counts_PC.sum(axis=1) > 0).sum())
    joint_PC = counts_PC / num_frames
    phone_entropy = _entropy(joint_PC.sum(axis=1))
    information = phone_entropy + _entropy(joint_PC.sum(axis=0)) - _entropy(joint_PC)
    return Scores(
        pnmi=float(information / phone_entropy) if num_phones > 1 else 1.0,
        phone_purity=float(joint_PC.max(axis=0).sum()),
        cluster_purity=float(joint_PC.max(axis=1).sum()),
        num_frames=num_frames,
        num_phones=num_phones,
    )


def joint_counts(
    phones_T: np.ndarray, codes_T: np.ndarray, *, num_phones: int, num_codes: int
) -> np.ndarray:
    """Frames with each phone and code, int64 (P, C); frames with NO_PHONE are left out."""
    known_T = phones_T != NO_PHONE
    pairs_T = phones_T[known_T].astype(np.int64) * num_codes + codes_T[known_T]
    counts = np.bincount(pairs_T, minlength=num_phones * num_codes)
    return counts.reshape(num_phones, num_codes)


def frame_phones(
    num_frames: int, *, hop: int, starts_I: np.ndarray, stops_I: np.ndarray, phones_I: np.ndarray
) -> np.ndarray:
    """The phone of each frame: the one at sample t * hop + 200, NO_PHONE where there is none.

    Interval i is [starts_I[i], stops_I[i]) in samples, in rising order; T int64.
    """
    if len(starts_I) == 0:
        return np.full(num_frames, NO_PHONE)
    centres_T = np.arange(num_frames) * hop + frames.RECEPTIVE_FIELD // 2
    place_T = np.searchsorted(starts_I, centres_T, side="right") - 1
    inside_T = (place_T >= 0) & (centres_T < np.asarray(stops_I)[place_T])
    return np.where(inside_T, np.asarray(phones_I)[place_T], NO_PHONE)


def perplexity(counts_C: np.ndarray) -> float:
    """exp of the entropy of how often each code is used: the number of codes when all are equal."""
    total = counts_C.sum()
    return float(np.exp(_entropy(counts_C / total))) if total else float("nan")


def _entropy(p: np.ndarray) -> float:
    """In nats; p sums to 1."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
