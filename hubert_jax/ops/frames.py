# SPDX-License-Identifier: Apache-2.0
"""The convolution stack's arithmetic: samples to frames and back, labels to frames.

Everything here is derived from one table, the seven convolutions of HuBERT (Hsu et al., 2021).
"""

import math

import numpy as np

SAMPLE_RATE = 16_000  # samples per second

CONV_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # (kernel, stride), samples
HOP = math.prod(stride for _, stride in CONV_LAYERS)  # 320 samples, 20 ms
FRAME_RATE = SAMPLE_RATE // HOP  # 50 frames per second


def _receptive_field() -> int:
    field = 1
    for kernel, stride in reversed(CONV_LAYERS):
        field = (field - 1) * stride + kernel
    return field


RECEPTIVE_FIELD = _receptive_field()  # 400 samples, 25 ms
MFCC_HOP = 160  # samples, 10 ms: Kaldi's frame shift, with the same 400-sample window


def num_frames(num_samples, *, hop: int = HOP):
    """Frames that `num_samples` give: (S - 400) // hop + 1, and 0 below 400 samples.

    Works on ints and on integer arrays (numpy and jax). Source: VALID convolutions, and Kaldi's
    snip_edges with `hop=MFCC_HOP`.
    """
    frames = (num_samples - RECEPTIVE_FIELD) // hop + 1
    return max(frames, 0) if isinstance(frames, int) else frames.clip(0)


def num_samples(num_frames: int) -> int:
    """The fewest samples that give `num_frames` frames."""
    return (num_frames - 1) * HOP + RECEPTIVE_FIELD


def conv_lengths(num_samples) -> list:
    """Length after each convolution, for ints or integer arrays; the last is `num_frames`."""
    lengths = []
    for kernel, stride in CONV_LAYERS:
        num_samples = (num_samples - kernel) // stride + 1
        lengths.append(num_samples)
    return lengths


def label_positions(num_frames: int, *, first_frame: int, label_rate: int) -> np.ndarray:
    """Which label each frame takes: floor(t * label_rate / 50) for t from `first_frame` on.

    `label_rate` is in labels per second: 100 for MFCC, 50 for the model's own layers.
    """
    return (first_frame + np.arange(num_frames)) * label_rate // FRAME_RATE
