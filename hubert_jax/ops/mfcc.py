# SPDX-License-Identifier: Apache-2.0
"""MFCC-39 as Kaldi computes it: 13 cepstra and their first and second differences, 100 Hz.

    audio -> 25 ms windows every 10 ms -> mean removed, pre-emphasis, Povey window
          -> power spectrum -> 23 mel bins -> log -> DCT, lifter -> cepstra -> differences

Options as in fairseq's dump_mfcc_feature.py, which are Kaldi's defaults without dither and with
cepstrum 0 in place of the energy. Tested against stored numbers of torchaudio.compliance.kaldi.

B batch, S samples, T frames, W window samples, F frequencies, M mel bins, K cepstra
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from hubert_jax.ops import frames

NUM_CEPSTRA = 13
WIDTH = 3 * NUM_CEPSTRA  # 39: cepstra, differences, differences of differences
NUM_MELS = 23
LOW_HZ, HIGH_HZ = 20.0, frames.SAMPLE_RATE / 2
NUM_FFT = 512  # the window of 400 samples, padded to a power of two
PREEMPHASIS = 0.97
LIFTER = 22.0
LOG_FLOOR = 1.1920929e-07  # float32 epsilon: audio is in [-1, 1], so quiet bins do reach it

FRAMES_IN_CACHE = 256  # on CPU so many windows at a time: 2.7 times the speed of all at once


def mfcc39(audio_BS: jax.Array, num_samples_B: jax.Array | None = None) -> jax.Array:
    """MFCC-39 of audio in [-1, 1] at 16 kHz: (B, T, 39), T = (S - 400) // 160 + 1.

    `num_samples_B` gives the length of each row that is padded to S; a row's frames are then those
    of the row alone, and the frames after them have no meaning. Also takes one utterance, S.
    """
    if audio_BS.ndim == 1:
        return mfcc39(audio_BS[None])[0]
    num_frames = frames.num_frames(audio_BS.shape[1], hop=frames.MFCC_HOP)
    if num_frames == 0:
        return jnp.zeros((audio_BS.shape[0], 0, WIDTH))
    if num_samples_B is None:
        num_samples_B = jnp.full(audio_BS.shape[0], audio_BS.shape[1])
    num_frames_B = frames.num_frames(num_samples_B, hop=frames.MFCC_HOP)
    cepstra_BTK = cepstra(audio_BS.astype(jnp.float32))
    first_BTK = differences(cepstra_BTK, num_frames_B)
    second_BTK = differences(first_BTK, num_frames_B)
    return jnp.concatenate([cepstra_BTK, first_BTK, second_BTK], axis=-1)


def cepstra(audio_BS: jax.Array) -> jax.Array:
    """The 13 liftered cepstra of every window: (B, T, 13)."""
    # A CPU is fastest with an FFT of what fits its cache. Elsewhere one big matmul is fastest, and
    # it splits over devices by rows, which XLA does not do with an FFT.
    return jax.lax.platform_dependent(audio_BS, cpu=_cepstra_in_chunks, default=_cepstra_by_matmul)


def differences(x_BTK: jax.Array, num_frames_B: jax.Array) -> jax.Array:
    """Slope over five frames, sum over n of n (x[t + n] - x[t - n]) / 10, edges repeated.

    Each row ends at its own `num_frames_B`: the frame before is what is repeated.
    """
    last_B = jnp.maximum(num_frames_B - 1, 0)
    last_B1K = jnp.take_along_axis(x_BTK, last_B[:, None, None], axis=1)
    x_BTK = jnp.where(jnp.arange(x_BTK.shape[1])[:, None] <= last_B[:, None, None], x_BTK, last_B1K)
    x_BTK = jnp.concatenate([x_BTK[:, :1]] * 2 + [x_BTK] + [last_B1K] * 2, axis=1)
    return (
        0.2 * (x_BTK[:, 4:] - x_BTK[:, :-4]) + 0.1 * (x_BTK[:, 3:-1] - x_BTK[:, 1:-3])
    )  # fmt: skip


def _cepstra_in_chunks(audio_BS: jax.Array) -> jax.Array:
    """Cepstra of a few windows of every row at a time, by FFT."""
    batch, num_samples = audio_BS.shape
    num_frames = frames.num_frames(num_samples, hop=frames.MFCC_HOP)
    chunk = min(num_frames, max(8, FRAMES_IN_CACHE // batch))
    num_chunks = -(-num_frames // chunk)
    needed = _samples_of_windows(num_chunks * chunk)
    audio_BS = jnp.pad(audio_BS[:, :needed], ((0, 0), (0, max(0, needed - num_samples))))

    def one_chunk(start):
        size = (batch, _samples_of_windows(chunk))
        windows_BTW = _windows(jax.lax.dynamic_slice(audio_BS, (0, start), size), chunk)
        spectrum_BTF = jnp.fft.rfft(windows_BTW, NUM_FFT)[..., : NUM_FFT // 2]
        return _cepstra_of_power(jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag))

    starts = jnp.arange(num_chunks) * (chunk * frames.MFCC_HOP)
    chunks = jax.lax.map(one_chunk, starts)  # (chunks, B, T of a chunk, K)
    return jnp.moveaxis(chunks, 0, 1).reshape(batch, -1, NUM_CEPSTRA)[:, :num_frames]


def _cepstra_by_matmul(audio_BS: jax.Array) -> jax.Array:
    """Cepstra of all windows at once, the Fourier transform as a matmul."""
    num_samples = audio_BS.shape[1]
    num_frames = frames.num_frames(num_samples, hop=frames.MFCC_HOP)
    needed = _samples_of_windows(num_frames)
    audio_BS = jnp.pad(audio_BS[:, :needed], ((0, 0), (0, max(0, needed - num_samples))))
    windows_BTW = _windows(audio_BS, num_frames)
    parts_BTF = _matmul(windows_BTW, _fourier_matrix())
    real_BTF, imag_BTF = jnp.split(parts_BTF, 2, axis=-1)
    return _cepstra_of_power(jnp.square(real_BTF) + jnp.square(imag_BTF))


def _samples_of_windows(num_frames: int) -> int:
    """Samples that `_windows` takes: whole hops, so that windows are made of slices of blocks."""
    return (num_frames + 2) * frames.MFCC_HOP


def _windows(audio_BS: jax.Array, num_frames: int) -> jax.Array:
    """Windows of 400 samples every 160, ready for the Fourier transform: (B, T, W)."""
    blocks = audio_BS.reshape(audio_BS.shape[0], -1, frames.MFCC_HOP)
    rest = frames.RECEPTIVE_FIELD - 2 * frames.MFCC_HOP
    x_BTW = jnp.concatenate(
        [blocks[:, :num_frames], blocks[:, 1 : num_frames + 1], blocks[:, 2:, :rest]], axis=-1
    )
    # Mean removed, then x[i] - 0.97 x[i - 1] where the sample before the first is the first.
    mean_BT1 = jnp.mean(x_BTW, axis=-1, keepdims=True)
    before_BTW = jnp.pad(x_BTW, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    before_BTW = jnp.where(np.arange(frames.RECEPTIVE_FIELD) == 0, x_BTW, before_BTW)
    emphasised_BTW = x_BTW - PREEMPHASIS * before_BTW - (1 - PREEMPHASIS) * mean_BT1
    return emphasised_BTW * _povey_window()


def _cepstra_of_power(power_BTF: jax.Array) -> jax.Array:
    log_mels_BTM = jnp.log(jnp.maximum(_matmul(power_BTF, _mel_matrix()), LOG_FLOOR))
    return _matmul(log_mels_BTM, _dct_matrix())


def _matmul(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)  # float32 on accelerators too


@functools.cache
def _povey_window() -> np.ndarray:
    """Hann to the power of 0.85, W."""
    return (np.hanning(frames.RECEPTIVE_FIELD) ** 0.85).astype(np.float32)


@functools.cache
def _fourier_matrix() -> np.ndarray:
    """W x 2F: cosines, then sines; the Nyquist bin, which no mel bin uses, is left out."""
    angles_WF = (
        2 * math.pi / NUM_FFT
        * np.outer(np.arange(frames.RECEPTIVE_FIELD), np.arange(NUM_FFT // 2))
    )  # fmt: skip
    return np.concatenate([np.cos(angles_WF), np.sin(angles_WF)], axis=1).astype(np.float32)


@functools.cache
def _mel_matrix() -> np.ndarray:
    """F x M: triangles between points equally spaced on the mel scale, 1127 ln(1 + Hz / 700)."""

    def mel(hz):
        return 1127.0 * np.log1p(hz / 700.0)

    points = np.linspace(mel(LOW_HZ), mel(HIGH_HZ), NUM_MELS + 2)
    left_M, centre_M, right_M = points[:-2], points[1:-1], points[2:]
    mels_F1 = mel(np.arange(NUM_FFT // 2) * frames.SAMPLE_RATE / NUM_FFT)[:, None]
    up_FM = (mels_F1 - left_M) / (centre_M - left_M)
    down_FM = (right_M - mels_F1) / (right_M - centre_M)
    return np.maximum(0, np.minimum(up_FM, down_FM)).astype(np.float32)


@functools.cache
def _dct_matrix() -> np.ndarray:
    """M x K: the orthonormal DCT-II, each column scaled by Kaldi's lifter."""
    k = np.arange(NUM_CEPSTRA)
    dct_MK = np.cos(math.pi / NUM_MELS * np.outer(np.arange(NUM_MELS) + 0.5, k))
    dct_MK *= np.where(k == 0, math.sqrt(1 / NUM_MELS), math.sqrt(2 / NUM_MELS))
    return (dct_MK * (1 + 0.5 * LIFTER * np.sin(math.pi * k / LIFTER))).astype(np.float32)
