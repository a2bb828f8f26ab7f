# SPDX-License-Identifier: Apache-2.0
"""MFCC-39 against stored numbers of Kaldi (goldens/make.py), alone and in padded batches."""

import pathlib

import jax
import numpy as np
import pytest

from hubert_jax import parity
from hubert_jax.ops import frames, mfcc

GOLDEN = np.load(pathlib.Path(parity.__file__).parent / "goldens" / "mfcc.npz")
LENGTHS = (400, 560, 1_359, 24_321)

# Wider than 1e-4 for digital silence, where torchaudio is 1.6e-4 from the numbers that float64
# gives (ours: 4e-5); everywhere else the two differ by less than 5e-5.
TOLERANCE = {"atol": 2e-4, "rtol": 0}


def golden(num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    audio_S = GOLDEN[f"audio_{num_samples}"].astype(np.float32) / 32768
    return audio_S, GOLDEN[f"mfcc_{num_samples}"]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_numbers_are_kaldis(num_samples):
    audio_S, want_TD = golden(num_samples)
    assert want_TD.shape == (frames.num_frames(num_samples, hop=160), 39)
    np.testing.assert_allclose(jax.jit(mfcc.mfcc39)(audio_S), want_TD, **TOLERANCE)


def test_what_other_devices_run_gives_kaldis_numbers_too():
    audio_S, want_TD = golden(24_321)
    cepstra_BTK = jax.jit(mfcc._cepstra_by_matmul)(audio_S[None])
    np.testing.assert_allclose(cepstra_BTK[0], want_TD[:, :13], **TOLERANCE)


def test_rows_of_a_padded_batch_are_those_of_the_utterances_alone():
    padded_BS = np.random.default_rng(0).normal(size=(len(LENGTHS), 24_400)).astype(np.float32)
    for row, num_samples in enumerate(LENGTHS):
        padded_BS[row, :num_samples] = golden(num_samples)[0]
    features_BTD = jax.jit(mfcc.mfcc39)(padded_BS, np.array(LENGTHS))
    for row, num_samples in enumerate(LENGTHS):
        want_TD = golden(num_samples)[1]
        np.testing.assert_allclose(features_BTD[row, : len(want_TD)], want_TD, **TOLERANCE)
    unmasked_BTD = jax.jit(mfcc.mfcc39)(padded_BS)  # the lengths are what keeps the noise out
    assert np.abs(unmasked_BTD[0, :1] - features_BTD[0, :1]).max() > 0.1


def test_differences_repeat_the_edges_of_each_row():
    x_BTK = np.random.default_rng(1).normal(size=(3, 9, 2)).astype(np.float32)
    num_frames_B = np.array([9, 4, 1])
    got_BTK = mfcc.differences(x_BTK, num_frames_B)
    for x_TK, got_TK, num_frames in zip(x_BTK, got_BTK, num_frames_B, strict=True):
        edges_TK = np.pad(x_TK[:num_frames], ((2, 2), (0, 0)), mode="edge")
        for t in range(num_frames):
            want_K = sum(n * (edges_TK[t + 2 + n] - edges_TK[t + 2 - n]) for n in (1, 2)) / 10
            np.testing.assert_allclose(got_TK[t], want_K, atol=1e-6)


def test_silence_lies_on_the_floor_and_short_audio_has_no_frame():
    silence_TD = np.asarray(mfcc.mfcc39(np.zeros(4_000, np.float32)))
    floor = np.log(np.finfo(np.float32).eps) * np.sqrt(mfcc.NUM_MELS)
    np.testing.assert_allclose(silence_TD[:, 0], floor, rtol=1e-6)
    np.testing.assert_allclose(silence_TD[:, 1:], 0, atol=1e-4)
    assert mfcc.mfcc39(np.zeros(399, np.float32)).shape == (0, 39)


def test_rows_on_eight_devices_give_the_same_numbers():
    audio_BS = np.stack([golden(1_359)[0] * scale for scale in np.linspace(0.2, 1, 8)])
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(mfcc.mfcc39)(jax.device_put(audio_BS, sharding))
    np.testing.assert_allclose(sharded, jax.jit(mfcc.mfcc39)(audio_BS), **TOLERANCE)
