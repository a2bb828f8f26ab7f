# SPDX-License-Identifier: Apache-2.0
"""Writes mfcc.npz: MFCC-39 of synthetic audio as Kaldi computes it, by torchaudio.

Made with torchaudio 2.11.0 and torch 2.13.0. The calls are those of fairseq's
examples/hubert/simple_kmeans/dump_mfcc_feature.py. Run again: python tests/goldens/make_mfcc.py
"""

import pathlib

import numpy as np
import torch
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

SAMPLE_RATE = 16_000


def synthetic_audio(num_samples: int, *, seed: int) -> np.ndarray:
    """A gliding buzz in noise, then digital silence, then both again with an offset, int16."""
    rng = np.random.default_rng(seed)
    seconds = np.arange(num_samples) / SAMPLE_RATE
    phase = 2 * np.pi * (110 * seconds + 60 * seconds**2)
    buzz = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 30))
    audio = 0.2 * buzz * (np.sin(2 * np.pi * 3 * seconds) > -0.6)
    # The noise keeps every bin within 60 dB of the loudest: what is lower differs between float32
    # implementations by their rounding (Kaldi's own by 1e-3 from the same numbers in float64).
    audio += 0.005 * rng.standard_normal(num_samples)
    audio *= (seconds < 0.6) | (seconds > 0.8)
    audio += 0.01 * (seconds > 0.9)
    return (audio.clip(-1, 1) * 32767).astype(np.int16)


def kaldi_mfcc39(audio: np.ndarray) -> np.ndarray:
    wave = torch.from_numpy(audio.astype(np.float32) / 32768)[None]
    mfccs = kaldi.mfcc(waveform=wave, sample_frequency=SAMPLE_RATE, use_energy=False).T
    deltas = compute_deltas(mfccs)
    return torch.cat([mfccs, deltas, compute_deltas(deltas)]).T.numpy()


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for seed, num_samples in enumerate((400, 560, 1_359, 24_321)):
        audio = synthetic_audio(num_samples, seed=seed)
        arrays[f"audio_{num_samples}"] = audio
        arrays[f"mfcc_{num_samples}"] = kaldi_mfcc39(audio)
    np.savez_compressed(pathlib.Path(__file__).with_name("mfcc.npz"), **arrays)


if __name__ == "__main__":
    main()
