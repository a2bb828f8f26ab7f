# SPDX-License-Identifier: Apache-2.0
"""Writes hubert_jax/parity/goldens: what the peers that are installed compute, at the least size.

    python tests/goldens/make.py                      transformers, torchaudio
    VENV=DIR tests/goldens/fairseq_env.sh && DIR/bin/python tests/goldens/make.py    fairseq

Made with transformers 5.24.0, torchaudio 2.11.0, fairseq 0.12.2, torch 2.13.0.
"""

import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / "hubert_jax" / "parity" / "goldens"
NUM_DRAWS = 10_000
SAMPLE_RATE = 16_000


def main() -> None:
    sys.path.insert(0, str(ROOT))  # fairseq's environment does not have this package
    from hubert_jax.parity import peers, record

    for peer in peers.PEERS:
        for kind in peers.NORMS if peers.is_installed(peer) else ():
            made = peers.make_record(peer, kind, peers.SIZES["stored"], num_samples=9_600)
            record.save(made, GOLDENS / f"{peer}_{kind}.npz")
    if peers.is_installed("torchaudio"):
        arrays: dict[str, np.ndarray] = {"version": np.array(peers.version("torchaudio"))}
        for seed, num_samples in enumerate((400, 560, 1_359, 24_321)):
            audio = synthetic_audio(num_samples, seed=seed)
            arrays[f"audio_{num_samples}"] = audio
            arrays[f"mfcc_{num_samples}"] = peers.kaldi_mfcc39(audio)
        np.savez_compressed(GOLDENS / "mfcc.npz", **arrays)
    if peers.is_installed("fairseq"):
        statistics = {"version": np.array(peers.version("fairseq"))} | mask_statistics()
        np.savez_compressed(GOLDENS / "masks.npz", **statistics)


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


def mask_statistics() -> dict[str, np.ndarray]:
    """Of fairseq's sampler with HuBERT's arguments; row by row, so that nothing is thinned."""
    import torch
    from fairseq.data.data_utils import compute_mask_indices

    from hubert_jax.parity import record

    found = {}
    for num_frames in (249, 781):
        np.random.seed(0)
        padding = torch.zeros(1, num_frames, dtype=torch.bool)
        draws = [
            compute_mask_indices(
                (1, num_frames), padding, 0.8, 10, "static", 0, min_masks=2, no_overlap=False,
                min_space=1,
            )
            for _ in range(NUM_DRAWS)
        ]  # fmt: skip
        counts_N, runs = record.mask_statistics(np.concatenate(draws))
        found |= {f"counts_{num_frames}": counts_N.astype(np.int16), f"runs_{num_frames}": runs}
    return found


if __name__ == "__main__":
    main()
