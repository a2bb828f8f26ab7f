# SPDX-License-Identifier: Apache-2.0
"""The small parts that the model is made of, as torch and fairseq have them.

Flax's own differ: its gelu is the tanh form, its norms have eps 1e-6, its kernels start as LeCun's.

B batch, S samples, T frames, C channels, D channels of an output, K taps
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from hubert_jax.sharding import on_own_rows

NORM_EPS = 1e-5  # of every norm in the model
STRETCH = 2048  # frames whose group norm is summed at a time: 4 MB of 512 channels


class Linear(nnx.Module):
    """x @ kernel + bias, computed in x's type; sizes may be tuples."""

    def __init__(self, size_in, size_out, *, key, init, axes):
        shape_in, shape_out = _shape(size_in), _shape(size_out)
        kernel_key, bias_key = jax.random.split(key)
        fan_in = math.prod(shape_in)
        self.kernel = nnx.Param(init(kernel_key, shape_in + shape_out, fan_in), axes=axes)
        bias = jnp.zeros(shape_out) if init is bert_normal else init(bias_key, shape_out, fan_in)
        self.bias = nnx.Param(bias, axes=axes[len(shape_in) :])

    def __call__(self, x):
        return x @ self.kernel[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


def _shape(size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def bert_normal(key, shape, fan_in):
    """N(0, 0.02); the bias that goes with it is 0."""
    return 0.02 * jax.random.normal(key, shape)


def torch_uniform(key, shape, fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for a Linear, kernel and bias alike."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


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
        y_BTC = strided_conv(x_BTC, self.kernel[...].astype(x_BTC.dtype), self.stride)
        return y_BTC if self.bias is None else y_BTC + self.bias[...].astype(x_BTC.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def strided_conv(x_BTC, kernel, stride: int):
    """Convolution over time, no padding: (B, T, C), (K, C, D) -> (B, (T - K) // stride + 1, D).

    On NVIDIA GPUs it is a product, and so are its gradients. On CPU, XLA's gradient for x
    multiplies with the zeros between the strides; here it is one plain convolution for each phase
    of the stride. docs/LOG.md has the times.
    """
    if kernel.shape[0] != stride:
        return _forward(x_BTC, kernel, stride)
    # Without gradients, a product: XLA on CPU sums the convolution of a few frames in another order
    # where it has many threads, and an utterance alone would not be the one in a batch.
    return _by_product(x_BTC, kernel, stride)


def _forward(x_BTC, kernel, stride: int):
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
        cuda=functools.partial(of_kernel, _by_product), default=functools.partial(of_kernel, _conv),
    )  # fmt: skip
    return grad_BTC, grad_kernel


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


def _to_length(x_BTC, num_frames: int):
    """With frames of zeros, or without the last ones."""
    unseen = max(0, num_frames - x_BTC.shape[1])
    return jnp.pad(x_BTC, ((0, 0), (0, unseen), (0, 0)))[:, :num_frames]


strided_conv.defvjp(
    lambda x_BTC, kernel, stride: (_forward(x_BTC, kernel, stride), (x_BTC, kernel)),
    _gradients_of_conv,
)


class LayerNorm(nnx.Module):
    """Over the last axis, in float32."""

    def __init__(self, width: int, *, axis: str = "width"):
        self.scale = nnx.Param(jnp.ones(width), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(axis,))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        centred = x32 - _mean_of_channels(x32)
        variance = _mean_of_channels(jnp.square(centred))
        normed = centred * jax.lax.rsqrt(variance + NORM_EPS)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


def _mean_of_channels(x):
    """On CPU the same bits in any batch: XLA adds up a row in an order that depends on how many
    rows there are, but not in a product with a matrix (a vector would not do either).
    """

    def product(x):
        return (x @ jnp.full((x.shape[-1], 4), 1 / x.shape[-1], x.dtype))[..., :1]

    def mean(x):
        return jnp.mean(x, axis=-1, keepdims=True)

    return jax.lax.platform_dependent(x, cpu=product, default=mean)


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

        With `lengths_B`, only the first `lengths_B` frames of each row count.
        """
        kernel_KC = conv.kernel[...][:, 0]
        windows_BTK = _windows(wave_BS.astype(jnp.float32), len(kernel_KC), conv.stride)
        batch, num_frames, _ = windows_BTK.shape
        if lengths_B is None:
            lengths_B = jnp.full(batch, num_frames)

        def statistics(rows, kernel_KC, scale_C):
            def squares(x_TK):
                y_TC = _product(x_TK.astype(wave_BS.dtype), kernel_KC)
                return jnp.square(y_TC.astype(jnp.float32))

            def mean_and_gain(windows_TK, length):
                weights_T1 = jnp.where(jnp.arange(num_frames) < length, 1 / length, 0)[:, None]
                mean_K = _sum_over_time(lambda x_TK: x_TK, windows_TK * weights_T1)
                centred_TK = (windows_TK - mean_K) * jnp.sqrt(weights_T1)
                variance_C = _sum_over_time(squares, centred_TK)
                return mean_K, jax.lax.rsqrt(variance_C + NORM_EPS) * scale_C

            return one_by_one(mean_and_gain, *rows)

        rows = windows_BTK, lengths_B
        mean_BK, gain_BC = on_own_rows(statistics, rows, kernel_KC, self.scale[...])
        centred_BTK = (windows_BTK - mean_BK[:, None]).astype(wave_BS.dtype)
        normed_BTC = _product(centred_BTK, kernel_KC * gain_BC[:, None])
        return normed_BTC + self.bias[...].astype(wave_BS.dtype)


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

    x_TK = jnp.pad(x_TK, ((0, -len(x_TK) % STRETCH), (0, 0))).reshape(-1, STRETCH, x_TK.shape[1])
    # From the first stretch and not from zeros, which a shard_map takes for equal on all devices.
    first_C = sum_of(x_TK[0])
    return jax.lax.scan(lambda sum_C, x_TK: (sum_C + sum_of(x_TK), None), first_C, x_TK[1:])[0]


def one_by_one(function, *args):
    """`function` of each slice of args along their first axis, as jax.vmap has it.

    On a CPU they are done in turn: what one needs stays in the cache, and its bits do not depend on
    how many there are.
    """
    return jax.lax.platform_dependent(
        *args,
        cpu=lambda *args: jax.lax.map(lambda slices: function(*slices), args),
        default=jax.vmap(function),
    )


def dropout(x, rate: float, key):
    """Zero a share `rate` of x and scale the rest; x itself without a key or a rate."""
    if key is None or rate == 0:
        return x
    keep = random_bits(key, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x * (1 / (1 - rate)), 0)


def random_bits(key, shape: tuple[int, ...]):
    """32 random bits for each element, uint32; an element's do not depend on how x is sharded.

    A hash of where the element is instead of jax.random's Threefry, which on CPU takes ten times as
    long as the softmax whose result it drops. Good enough for dropout; masks are drawn elsewhere.
    """
    seeds = jax.random.bits(key, (2,))
    row = jnp.zeros((*shape[:-1], 1), jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return bits_of_columns(bits_of_rows(row, seeds), column)


def bits_of_rows(row, seeds_2):
    """What the columns of a row start from; rows by their number among all, uint32."""
    return _hash(row ^ seeds_2[0]) ^ seeds_2[1]


def bits_of_columns(row_bits, column):
    golden = jnp.uint32(0x9E3779B9)  # 2^32 divided by the golden ratio: neighbours end up far apart
    return _hash(row_bits + column * golden)


def _hash(x):
    """A bijection of uint32 that mixes all bits. Source: C. Wellons, hash-prospector, lowbias32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.custom_vjp
def gelu(x):
    """The exact GELU, x * Phi(x); its slope is kept from the forward pass: one erf, not two."""
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    x32 = x.astype(jnp.float32)
    phi = 0.5 * (1 + jax.lax.erf(x32 * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x32 * x32) * (1 / math.sqrt(2 * math.pi))
    return (x32 * phi).astype(x.dtype), (phi + x32 * density).astype(x.dtype)


gelu.defvjp(_gelu_and_slope, lambda slope, grad: (grad * slope,))


@jax.custom_vjp
def scale_gradient(x, scale: float):
    """x forwards, `scale` times the gradient backwards."""
    return x


scale_gradient.defvjp(lambda x, scale: (x, scale), lambda scale, grad: (grad * scale, None))
