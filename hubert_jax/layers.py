# SPDX-License-Identifier: Apache-2.0
"""The small parts that the model is made of, as torch and fairseq have them.

Flax's own differ: its gelu is the tanh form, its norms have eps 1e-6, its kernels start as LeCun's.

B batch, T frames, C channels
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

NORM_EPS = 1e-5  # of every norm in the model


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


class LayerNorm(nnx.Module):
    """Over the last axis, in float32."""

    def __init__(self, width: int, *, axis: str = "width"):
        self.scale = nnx.Param(jnp.ones(width), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(axis,))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + NORM_EPS)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Each channel over time (as many groups as channels), in float32."""

    def __init__(self, width: int, *, axis: str = "width"):
        self.scale = nnx.Param(jnp.ones(width), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(axis,))

    def __call__(self, x_BTC, lengths_B=None):
        """With `lengths_B`, only the first `lengths_B` frames of each row count."""
        x32_BTC = x_BTC.astype(jnp.float32)
        if lengths_B is None:
            mean_B1C = jnp.mean(x32_BTC, axis=1, keepdims=True)
            variance_B1C = jnp.mean(jnp.square(x32_BTC - mean_B1C), axis=1, keepdims=True)
        else:
            real_BT1 = (jnp.arange(x_BTC.shape[1]) < lengths_B[:, None])[..., None]
            count_B11 = jnp.maximum(lengths_B, 1).astype(jnp.float32)[:, None, None]
            mean_B1C = _sum_over_time(x32_BTC * real_BT1) / count_B11
            squares_BTC = jnp.square(x32_BTC - mean_B1C) * real_BT1
            variance_B1C = _sum_over_time(squares_BTC) / count_B11
        normed_BTC = (x32_BTC - mean_B1C) * jax.lax.rsqrt(variance_B1C + NORM_EPS)
        return (normed_BTC * self.scale[...] + self.bias[...]).astype(x_BTC.dtype)


def _sum_over_time(x_BTC, block: int = 64):
    """Sums of `block` frames, then their sum: (B, 1, C).

    XLA on CPU would add the frames of a single row one after the other in float32: an utterance
    alone would be 1e-5 from the same one in a batch, whose sums are blocked in any case.
    """
    missing = -x_BTC.shape[1] % block
    window = (1, block, 1)
    sums_BTC = jax.lax.reduce_window(
        x_BTC, 0.0, jax.lax.add, window, window, ((0, 0), (0, missing), (0, 0))
    )
    return jnp.sum(sums_BTC, axis=1, keepdims=True)


def dropout(x, rate: float, key):
    """Zero a share `rate` of x and scale the rest; x itself without a key or a rate."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


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
