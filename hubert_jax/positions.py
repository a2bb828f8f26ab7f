# SPDX-License-Identifier: Apache-2.0
"""The position convolution of the encoder.

B batch, T frames, D width, G groups, P taps
"""

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from hubert_jax.layers import gelu, one_by_one
from hubert_jax.sharding import on_own_rows

if TYPE_CHECKING:
    from hubert_jax.model import HubertConfig


class PositionConv(nnx.Module):
    """Relative positions: a grouped convolution over 128 frames, weight-normalised per tap, GELU.

    Padded with 64 frames on both sides and the last output dropped, so that a frame sees 64 frames
    before it and 63 after; XLA's SAME would see 63 and 64.

    XLA runs a grouped convolution of this size very slowly, its gradient above all. Here the taps
    are cut into runs of RUN. One matmul gives what every run makes of RUN frames, wherever they
    begin: T + P - RUN rows. An output is the sum over the runs, each taken RUN frames later than
    the one before. docs/LOG.md has the times, and those of other forms.
    """

    RUN = 8

    def __init__(self, config: "HubertConfig", *, key):
        taps, width = config.position_kernel, config.width
        if taps % self.RUN:
            raise ValueError(f"model.position_kernel {taps} must be a multiple of {self.RUN}")
        std = math.sqrt(4 / (taps * width))
        kernel = std * jax.random.normal(key, (taps, width // config.position_groups, width))
        self.groups = config.position_groups
        self.kernel = nnx.Param(kernel, axes=("frames", "conv_in", "width"))
        self.gain_P = nnx.Param(_norm_per_tap(kernel), axes=("frames",))
        self.bias = nnx.Param(jnp.zeros(width), axes=("width",))

    def weight(self):
        """The normalised kernel: (P, D / G, D)."""
        kernel = self.kernel[...]
        return kernel * (self.gain_P[...] / _norm_per_tap(kernel))[:, None, None]

    def __call__(self, x_BTD):
        # Each device does its own rows: what goes between devices is the kernel and its gradient.
        y_BTD = on_own_rows(self._convolve, x_BTD, self.weight().astype(x_BTD.dtype))
        return gelu(y_BTD + self.bias[...].astype(y_BTD.dtype))

    def _convolve(self, x_BTD, kernel):
        batch, num_frames, width = x_BTD.shape
        taps, group_width, _ = kernel.shape
        groups, run = self.groups, self.RUN

        x = jnp.pad(x_BTD, ((0, 0), (taps // 2, taps // 2 - 1), (0, 0)))
        x = x.reshape(batch, -1, groups, group_width).transpose(2, 0, 1, 3)
        # [group, tap of its run, channel in, run, channel out]
        kernel = kernel.reshape(-1, run, group_width, groups, group_width).transpose(3, 1, 2, 0, 4)
        kernel = kernel.reshape(groups, run * group_width, -1)

        def convolve_group(x, kernel):
            num_starts = num_frames + taps - run
            seen = jnp.concatenate([x[:, i : i + num_starts] for i in range(run)], axis=-1)
            # Parts are rounded to x's type, and added up in float32.
            by_run = jnp.split(seen @ kernel, taps // run, axis=-1)
            first, *others = (
                part[:, run * j : run * j + num_frames].astype(jnp.float32)
                for j, part in enumerate(by_run)
            )
            return sum(others, first).astype(x.dtype)

        def convolve_group_by_place(x, kernel):
            num_starts, num_runs = num_frames + taps - run, taps // run
            seen = jnp.broadcast_to(x[:, None], (batch, run, *x.shape[1:]))
            seen = _later(seen, 1)[:, :, :num_starts].swapaxes(1, 2)
            parts = seen.reshape(batch, num_starts, -1) @ kernel
            parts = parts.reshape(batch, num_starts, num_runs, -1).swapaxes(1, 2)
            parts = _later(parts, run)[:, :, :num_frames]
            return jnp.sum(parts.astype(jnp.float32), axis=1).astype(x.dtype)

        y = jax.lax.platform_dependent(
            x, kernel,
            cuda=jax.vmap(convolve_group_by_place),
            default=functools.partial(one_by_one, convolve_group),
        )  # fmt: skip
        return y.transpose(1, 2, 0, 3).reshape(batch, num_frames, width)


def _later(x_BNTC, step: int):
    """Each of N rows begins `step` frames later than the one before; its end is of no use.

    By reading them all with a row that is longer, whose numbers a GPU finds by their place alone.
    Of a concatenation it asks in which of its pieces each one is, which takes eight times as long.
    """
    batch, num, length, width = x_BNTC.shape
    flat = jnp.pad(x_BNTC.reshape(batch, num * length, width), ((0, 0), (0, num * step), (0, 0)))
    return flat.reshape(batch, num, length + step, width)


def _norm_per_tap(kernel):
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=(1, 2)))
