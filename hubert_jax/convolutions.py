# SPDX-License-Identifier: Apache-2.0
"""Strided convolutions over time, and how each platform computes them and their gradients.

B batch, T frames, C channels, D channels of an output, K taps
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from hubert_jax.layers import (
    NORM_EPS,
    gelu,
    gelu_and_slope,
    has_kernels,
    one_by_one,
    torch_uniform,
)
from hubert_jax.sharding import on_own_rows

ALIGNED = 16  # frames: what cuBLAS' kernels want of all sizes, and would else copy for
STRETCH = 2048  # frames whose group norm is summed at a time: 4 MB of 512 channels


class Conv(nnx.Module):
    """One strided convolution over time, no padding; Kaiming-normal (fan_in, gain sqrt 2)."""

    def __init__(self, width_in, width_out, kernel, stride, *, bias, key):
        std = math.sqrt(2 / (kernel * width_in))
        shape = (kernel, width_in, width_out)
        axes = ("frames", "conv_in", "conv_out")
        self.stride = stride
        self.kernel = nnx.Param(std * jax.random.normal(key, shape), axes=axes)
        # torch leaves the bias uniform in +-1 / sqrt(fan_in)
        bias_key = jax.random.fold_in(key, 1)
        self.bias = (
            nnx.Param(torch_uniform(bias_key, (width_out,), kernel * width_in), axes=("conv_out",))
            if bias
            else None
        )

    def __call__(self, x_BTC):
        kernel = self.kernel[...].astype(x_BTC.dtype)
        return self._with_bias(strided_conv(x_BTC, kernel, self.stride))

    def after_gelu(self, x_BTC):
        """Of gelu(x_BTC): on GPUs one kernel computes both of their gradients."""
        kernel = self.kernel[...].astype(x_BTC.dtype)
        return self._with_bias(conv_of_gelu(x_BTC, kernel, self.stride))

    def _with_bias(self, y_BTC):
        return y_BTC if self.bias is None else y_BTC + self.bias[...].astype(y_BTC.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def strided_conv(x_BTC, kernel, stride: int):
    """Convolution over time, no padding: (B, T, C), (K, C, D) -> (B, (T - K) // stride + 1, D).

    On NVIDIA GPUs it is a product, and so are its gradients. On CPU, XLA's gradient for x
    multiplies with the zeros between the strides; here it is one plain convolution for each phase
    of the stride, and the kernel's is a product. docs/LOG.md has the times.
    """
    if kernel.shape[0] != stride or fits_kernels(x_BTC, kernel):
        return _forward(x_BTC, kernel, stride)
    # Without gradients, a product: XLA on CPU sums the convolution of a few frames in another order
    # where it has many threads, and an utterance alone would not be the one in a batch.
    return _by_product(x_BTC, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_of_gelu(x_BTC, kernel, stride: int):
    """strided_conv(gelu(x_BTC), kernel, stride)."""
    return strided_conv(gelu(x_BTC), kernel, stride)


def fits_kernels(x, kernel_KCD) -> bool:
    """Whether the kernels of strided.py compute it."""
    return has_kernels(x.dtype) and not any(width % 128 for width in kernel_KCD.shape[1:])


def _forward(x_BTC, kernel, stride: int):
    if fits_kernels(x_BTC, kernel):
        from hubert_jax import strided  # needs Pallas' Triton, which only GPUs do

        conv = functools.partial(strided.output, stride=stride)
        return on_own_rows(conv, x_BTC, kernel)
    return jax.lax.platform_dependent(
        x_BTC, kernel,
        cuda=functools.partial(_by_product, stride=stride),
        default=functools.partial(_conv, stride=stride),
    )  # fmt: skip


def _conv(x_BTC, kernel, stride: int = 1):
    return jax.lax.conv_general_dilated(
        x_BTC, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


def _by_product(x_BTC, kernel, stride: int):
    """What each frame sees, all taps side by side, times the kernel."""
    taps, width_in, width_out = kernel.shape
    num_frames = (x_BTC.shape[1] - taps) // stride + 1
    runs = -(-taps // stride)
    length = (num_frames + runs - 1) * stride
    missing = max(0, length - x_BTC.shape[1])
    x_BTC = jnp.pad(x_BTC, ((0, 0), (0, missing), (0, 0)))[:, :length]
    blocks_BTC = x_BTC.reshape(len(x_BTC), -1, stride * width_in)
    seen = [
        blocks_BTC[:, i : i + num_frames, : (taps - i * stride) * width_in] for i in range(runs)
    ]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(-1, width_out)


def _gradients_of_conv(stride: int, saved, grad_BTD):
    x_BTC, kernel = saved
    return _gradients(stride, x_BTC, None, kernel, grad_BTD)


def _gradients_of_both(stride: int, saved, grad_BTD):
    seen_BTC, slope_BTC, kernel = saved
    return _gradients(stride, seen_BTC, slope_BTC, kernel, grad_BTD)


def _gradients(stride: int, x_BTC, slope_BTC, kernel, grad_BTD):
    """For what made x_BTC, whose slope there is slope_BTC (None: x itself), and for the kernel."""
    if slope_BTC is not None and fits_kernels(x_BTC, kernel):
        return _gradients_by_kernels(stride, x_BTC, slope_BTC, kernel, grad_BTD)

    def of_kernel(form, grad_BTD, x_BTC):
        return jax.linear_transpose(lambda k: form(x_BTC, k, stride), kernel)(grad_BTD)[0]

    def of_input(grad_BTD, kernel):
        return jax.linear_transpose(lambda x: _conv(x, kernel, stride), x_BTC)(grad_BTD)[0]

    num_frames = x_BTC.shape[1]
    by_phase = functools.partial(_input_gradient, stride=stride, num_frames=num_frames)
    by_product = functools.partial(_input_gradient_by_product, stride=stride, num_frames=num_frames)

    # Not by the default backend: hubert plan compiles for TPUs on a CPU.
    grad_BTC = jax.lax.platform_dependent(
        grad_BTD, kernel, cpu=by_phase, cuda=by_product, default=of_input
    )  # fmt: skip
    grad_kernel = jax.lax.platform_dependent(
        grad_BTD, x_BTC,
        cpu=functools.partial(_kernel_gradient, taps=len(kernel), stride=stride),
        cuda=functools.partial(of_kernel, _by_product),
        default=functools.partial(of_kernel, _conv),
    )  # fmt: skip
    return grad_BTC if slope_BTC is None else grad_BTC * slope_BTC, grad_kernel


def _gelu_by_kernel(x_BTC):
    from hubert_jax import gelus  # needs Pallas' Triton, which only GPUs do

    both = gelus.with_slope(x_BTC.reshape(-1, x_BTC.shape[-1]))
    return tuple(y.reshape(x_BTC.shape) for y in both)


def _gradients_by_kernels(stride: int, x_BTC, slope_BTC, kernel, grad_BTD):
    from hubert_jax import strided  # needs Pallas' Triton, which only GPUs do

    def gradients(rows, kernel):
        x_BTC, slope_BTC, grad_BTD = rows
        grad_BTC = strided.input_gradient(grad_BTD, kernel, slope_BTC, stride=stride)
        grads_BKCD = strided.kernel_gradient(x_BTC, grad_BTD, taps=len(kernel), stride=stride)
        return grad_BTC, grads_BKCD

    grad_BTC, grads_BKCD = on_own_rows(gradients, (x_BTC, slope_BTC, grad_BTD), kernel)
    return grad_BTC, jnp.sum(grads_BKCD, axis=0).astype(kernel.dtype)


def _input_gradient(grad_BTD, kernel, *, stride: int, num_frames: int):
    """x[stride * t + phase] went through every stride-th tap, from tap `phase` on."""
    most_taps = -(-kernel.shape[0] // stride)
    phases = []
    for phase in range(stride):
        taps = kernel[phase::stride][::-1].swapaxes(1, 2)
        around = (len(taps) - 1, most_taps - 1)
        phases.append(_conv(jnp.pad(grad_BTD, ((0, 0), around, (0, 0))), taps))
    grad_BTC = jnp.stack(phases, axis=2).reshape(len(grad_BTD), -1, kernel.shape[1])
    return _to_length(grad_BTC, num_frames)


def _input_gradient_by_product(grad_BTD, kernel, *, stride: int, num_frames: int):
    """`stride` frames of x at a time are one row of a product: all of them with the same outputs.

    A tap that a kernel lacks is a block of zeros: with 3 taps at stride 2 a third more operations,
    and yet faster than to add up what the taps give where they overlap.
    """
    taps, width_in, width_out = kernel.shape
    runs = -(-taps // stride)
    kernel = jnp.pad(kernel, ((0, runs * stride - taps), (0, 0), (0, 0)))
    kernel = kernel.reshape(runs, stride * width_in, width_out).swapaxes(1, 2)
    around = [((0, 0), (run, runs - 1 - run), (0, 0)) for run in range(runs)]
    seen = jnp.concatenate([jnp.pad(grad_BTD, pad) for pad in around], axis=-1)
    grad_BTC = seen @ kernel.reshape(-1, stride * width_in)
    return _to_length(grad_BTC.reshape(len(grad_BTD), -1, width_in), num_frames)


def _kernel_gradient(grad_BTD, x_BTC, *, taps: int, stride: int):
    """`stride` frames of x at a time are one row of a product, for as many taps."""
    width_in, width_out = x_BTC.shape[2], grad_BTD.shape[2]
    grads = []
    for first in range(0, taps, stride):
        part_BTC = _to_length(x_BTC[:, first:], grad_BTD.shape[1] * stride)
        rows_NK = part_BTC.reshape(-1, stride * width_in)[:, : (taps - first) * width_in]
        grads.append(rows_NK.T @ grad_BTD.reshape(-1, width_out))
    return jnp.concatenate(grads).reshape(taps, width_in, width_out)


def _to_length(x_BTC, num_frames: int):
    """With frames of zeros, or without the last ones."""
    unseen = max(0, num_frames - x_BTC.shape[1])
    return jnp.pad(x_BTC, ((0, 0), (0, unseen), (0, 0)))[:, :num_frames]


strided_conv.defvjp(
    lambda x_BTC, kernel, stride: (_forward(x_BTC, kernel, stride), (x_BTC, kernel)),
    _gradients_of_conv,
)


def _forward_of_both(x_BTC, kernel, stride: int):
    if fits_kernels(x_BTC, kernel):
        seen_BTC, slope_BTC = on_own_rows(_gelu_by_kernel, x_BTC)
    else:
        seen_BTC, slope_BTC = gelu_and_slope(x_BTC)
    return _forward(seen_BTC, kernel, stride), (seen_BTC, slope_BTC, kernel)


conv_of_gelu.defvjp(_forward_of_both, _gradients_of_both)


class GroupNorm(nnx.Module):
    """Each channel over time (as many groups as channels), of the convolution of a waveform.

    The convolution sees few samples and has many channels: its output is cheaper computed twice
    than stored and read again. Once for the variance, then with the norm in the kernel; its mean is
    taken off the samples, before the product. Sums are float32.
    """

    def __init__(self, width: int, *, axis: str = "width"):
        self.scale = nnx.Param(jnp.ones(width), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(axis,))

    def __call__(self, conv: Conv, wave_BS, lengths_B=None):
        """What `conv`, whose bias the norm takes away, makes of (B, S), normalised: (B, T, C).

        With `lengths_B`, only the first `lengths_B` frames of each row count. Frames may follow
        that are not whole, up to a multiple of ALIGNED.
        """
        kernel_KC = conv.kernel[...][:, 0]
        taps, stride, dtype = len(kernel_KC), conv.stride, wave_BS.dtype
        batch, num_samples = wave_BS.shape
        num_frames = (num_samples - taps) // stride + 1
        if lengths_B is None:
            lengths_B = jnp.full(batch, num_frames)
        is_aligned = has_kernels(dtype)
        if is_aligned:
            missing = taps + (num_frames - 1 + -num_frames % ALIGNED) * stride - num_samples
            wave_BS = jnp.pad(wave_BS, ((0, 0), (0, max(0, missing))))
        windows_BTK = _windows(wave_BS.astype(jnp.float32), taps, stride)

        def statistics(rows, kernel_KC, scale_C):
            def mean_and_gain(windows_TK, length):
                is_real_T = jnp.arange(len(windows_TK)) < length
                weights_T1 = jnp.where(is_real_T, 1 / length, 0)[:, None]
                mean_K, variance_C = _mean_and_variance(windows_TK, weights_T1, kernel_KC, dtype)
                return mean_K, jax.lax.rsqrt(variance_C + NORM_EPS) * scale_C

            return one_by_one(mean_and_gain, *rows)

        rows = windows_BTK, lengths_B
        mean_BK, gain_BC = on_own_rows(statistics, rows, kernel_KC, self.scale[...])
        centred_BTK = (windows_BTK - mean_BK[:, None]).astype(dtype)
        kernel_BKC = kernel_KC * gain_BC[:, None]
        bias_C = self.bias[...]
        if not is_aligned:
            return _product(centred_BTK, kernel_BKC) + bias_C.astype(dtype)
        return _product_with_bias(centred_BTK, kernel_BKC, bias_C)


def _product_with_bias(x_BTK, kernel_BKC, bias_C):
    """The bias is one more tap, whose gradient comes with the kernel's; with zeros to ALIGNED."""
    batch, num_frames, taps = x_BTK.shape
    missing = (0, -(taps + 1) % ALIGNED)
    ones_BT1 = jnp.ones((batch, num_frames, 1), x_BTK.dtype)
    bias_B1C = jnp.broadcast_to(bias_C, (batch, 1, len(bias_C)))
    x_BTK = jnp.pad(jnp.concatenate([x_BTK, ones_BT1], axis=2), ((0, 0), (0, 0), missing))
    kernel_BKC = jnp.concatenate([kernel_BKC, bias_B1C], axis=1)
    return _product(x_BTK, jnp.pad(kernel_BKC, ((0, 0), missing, (0, 0))))


def _mean_and_variance(windows_TK, weights_T1, kernel_KC, dtype):
    """The windows' mean, (K,), and the variance of what the kernel makes of them, (C,).

    On NVIDIA's GPUs, in less than float32, both come from sums over the windows and of their K x K
    products, which are the same for all channels. Where a kernel lets little of the samples
    through, that loses some of float32's digits, but fewer than products of bfloat16.
    """
    by_channel = functools.partial(_by_channel, dtype=dtype)
    if dtype == jnp.float32:
        return by_channel(windows_TK, weights_T1, kernel_KC)
    return jax.lax.platform_dependent(
        windows_TK, weights_T1, kernel_KC, cuda=_by_products, default=by_channel
    )


def _by_channel(windows_TK, weights_T1, kernel_KC, *, dtype):
    def squares(x_TK):
        return jnp.square(_product(x_TK.astype(dtype), kernel_KC).astype(jnp.float32))

    mean_K = _sum_over_time(lambda x_TK: x_TK, windows_TK * weights_T1)
    return mean_K, _sum_over_time(squares, (windows_TK - mean_K) * jnp.sqrt(weights_T1))


def _by_products(windows_TK, weights_T1, kernel_KC):
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    mean_K = jnp.sum(windows_TK * weights_T1, axis=0)
    centred = _stretches((windows_TK - mean_K) * jnp.sqrt(weights_T1))
    sums_KK = jnp.sum(product(centred.swapaxes(1, 2), centred), axis=0)
    variance_C = jnp.sum(kernel_KC * product(sums_KK, kernel_KC), axis=0)
    return mean_K, jnp.maximum(variance_C, 0)  # what cancels may be less


def _windows(wave_BS, kernel: int, stride: int):
    """The samples that a convolution sees, `kernel` a multiple of `stride`: (B, T, K)."""
    num_blocks = wave_BS.shape[1] // stride
    num_frames = num_blocks - kernel // stride + 1
    blocks = wave_BS[:, : num_blocks * stride].reshape(-1, num_blocks, stride)
    return jnp.concatenate([blocks[:, i : i + num_frames] for i in range(kernel // stride)], -1)


def _product(x, kernel):
    return x @ kernel.astype(x.dtype)


def _sum_over_time(function, x_TK):
    """Of `function(x_TK)`, which makes zeros of zeros and treats frames alike: (C,).

    STRETCH frames at a time, in the same order whatever T is; what function returns is not kept,
    not for the gradient either.
    """

    @jax.checkpoint
    def sum_of(x_TK):
        return jnp.sum(function(x_TK), axis=0)

    x_TK = _stretches(x_TK)
    # From the first stretch and not from zeros, which a shard_map takes for equal on all devices.
    first_C = sum_of(x_TK[0])
    return jax.lax.scan(lambda sum_C, x_TK: (sum_C + sum_of(x_TK), None), first_C, x_TK[1:])[0]


def _stretches(x_TK):
    """(T / STRETCH, STRETCH, K), the last one with zeros."""
    return jnp.pad(x_TK, ((0, -len(x_TK) % STRETCH), (0, 0))).reshape(-1, STRETCH, x_TK.shape[1])
