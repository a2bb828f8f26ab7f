# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of the model, a multiply-add being two; norms and the like left out."""

from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames


def forward(config: HubertConfig, num_samples: int, *, num_layers: int | None = None) -> float:
    """Of one row of `num_samples`, through the first `num_layers` layers, without a head."""
    num_layers = config.num_layers if num_layers is None else num_layers
    lengths = frames.conv_lengths(num_samples)
    num_frames, width = lengths[-1], config.width
    total = first_convolution(config, num_samples)
    for length, (kernel, _) in zip(lengths[1:], frames.CONV_LAYERS[1:], strict=True):
        total += 2 * length * kernel * config.conv_width**2
    total += 2 * num_frames * config.conv_width * width
    total += 2 * num_frames * config.position_kernel * width * width / config.position_groups
    linear = 2 * num_frames * (4 * width**2 + 2 * width * config.ffn_width)
    attention = 4 * num_frames**2 * width
    return total + num_layers * (linear + attention)


def training(config: HubertConfig, num_samples: int) -> float:
    """Forward and backward: three times forward, but for the gradient of the samples."""
    return 3 * forward(config, num_samples) - first_convolution(config, num_samples)


def first_convolution(config: HubertConfig, num_samples: int) -> float:
    kernel, _ = frames.CONV_LAYERS[0]
    return 2 * frames.conv_lengths(num_samples)[0] * kernel * config.conv_width
