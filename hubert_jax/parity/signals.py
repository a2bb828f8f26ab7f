# SPDX-License-Identifier: Apache-2.0
"""MFCC and masks against those of torchaudio and fairseq, from stored numbers.

goldens/mfcc.npz: audio (int16) and torchaudio's Kaldi MFCC-39 of it; goldens/masks.npz: what
fairseq's sampler gave in 10,000 draws, as numbers of masked frames and lengths of masked runs.

S samples, T frames, D width, N draws
"""

import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from hubert_jax.ops import masking, mfcc
from hubert_jax.parity import compare
from hubert_jax.parity.compare import STACK, Row
from hubert_jax.parity.record import mask_statistics

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NUM_DRAWS, NUM_FRAMES = 10_000, (249, 781)  # 5 and 15.6 s
# Two samples of 10,000 from one distribution are further apart once in a thousand times.
KOLMOGOROV_SMIRNOV = 1.95 * math.sqrt(2 / NUM_DRAWS)


def mfcc_rows(kaldi_mfcc39: Callable[[np.ndarray], np.ndarray] | None) -> list[Row]:
    """MFCC-39 of the stored audio, against `kaldi_mfcc39` of it or, without, the stored one."""
    rows = []
    with np.load(GOLDENS / "mfcc.npz") as stored:
        peer = f"torchaudio's Kaldi {stored['version']}{'' if kaldi_mfcc39 else ', stored'}"
        for name in (name for name in stored if name.startswith("audio_")):
            audio_S = stored[name]
            wanted_TD = stored[name.replace("audio", "mfcc")]
            if kaldi_mfcc39 is not None:
                wanted_TD = kaldi_mfcc39(audio_S)
            ours_TD = np.asarray(_mfcc39(audio_S.astype(np.float32) / 2**15))
            model = f"{len(audio_S)} samples"
            rows.append(compare.difference("MFCC-39", peer, model, ours_TD, wanted_TD, STACK))
    return rows


def mask_rows(num_frames: int) -> list[Row]:
    """Statistics of our span masks against the reference's, whose draws are others."""
    rows = []
    with np.load(GOLDENS / "masks.npz") as stored:
        theirs = dict(stored)
    peer = f"fairseq {theirs.pop('version')}, stored"
    masks_NT = masking.span_mask(jax.random.key(0), NUM_DRAWS, num_frames, prob=0.8, length=10)
    counts_N, runs = mask_statistics(np.asarray(masks_NT))
    wanted_N, wanted_runs = (theirs[f"{what}_{num_frames}"] for what in ("counts", "runs"))
    model = f"{num_frames} frames"
    share, wanted = counts_N.mean() / num_frames, wanted_N.mean() / num_frames
    # four standard errors of the difference of two means
    errors = float(4 * np.sqrt(2 / NUM_DRAWS) * wanted_N.std() / num_frames)
    found, note = float(abs(share - wanted)), f"{share:.4f} against {wanted:.4f}"
    rows.append(
        Row(
            "masked share, mean of 10,000 rows",
            peer,
            model,
            found,
            found / wanted,
            errors,
            note,
        )
    )
    for quantity, ours, others in (
        ("masked frames, distribution", np.bincount(counts_N), np.bincount(wanted_N)),
        ("masked runs, distribution of lengths", runs, wanted_runs),
    ):
        distance = _largest_gap(ours, others)
        rows.append(Row(quantity, peer, model, distance, distance, KOLMOGOROV_SMIRNOV))
    return rows


def _largest_gap(ours: np.ndarray, others: np.ndarray) -> float:
    """Between two cumulative distributions given as counts: the Kolmogorov-Smirnov statistic."""
    size = max(len(ours), len(others))
    shares = [np.cumsum(np.pad(x, (0, size - len(x))) / x.sum()) for x in (ours, others)]
    return float(np.abs(shares[0] - shares[1]).max())


_mfcc39 = jax.jit(mfcc.mfcc39)
