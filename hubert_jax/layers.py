# SPDX-License-Identifier: Apache-2.0
"""The small parts that the model is made of, as torch and fairseq have them.

Flax's own differ: its gelu is the tanh form, its norms have eps 1e-6, its kernels start as LeCun's.

B batch, T frames, N rows, D width, E width of a product
"""

import importlib.util
import math

import jax
import jax.numpy as jnp
from flax import nnx

from hubert_jax.sharding import cuda_capability, is_hopper, on_own_rows, ways

NORM_EPS = 1e-5  # of every norm in the model
AMPERE = 8.0  # a compute capability of NVIDIA's GPUs


def has_triton(dtype) -> bool:
    """Whether Pallas' Triton is there for it: bfloat16 on one of NVIDIA's GPUs, from Ampere on."""
    if dtype != jnp.bfloat16 or cuda_capability() < AMPERE:
        return False
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None  # jax may drop it


def has_kernels(dtype) -> bool:
    """Whether our kernels take the place of XLA's: on Hopper, where that was measured."""
    return has_triton(dtype) and is_hopper()


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
        return product(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)

    def gelu(self, x):
        """gelu(self(x)), for which GPUs add the bias on the way."""
        width = self.kernel[...].shape[-1]
        if not has_kernels(x.dtype) or width % 128 or ways("ffn") > 1:
            return gelu(self(x))
        from hubert_jax import gelus  # needs Pallas' Triton, which only GPUs do

        def of_sum(x, bias):
            return gelus.gelu_of_sum(x.reshape(-1, width), bias).reshape(x.shape)

        return on_own_rows(of_sum, x @ self.kernel[...].astype(x.dtype), self.bias[...])


def _shape(size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


@jax.custom_vjp
def product(x, kernel):
    """Sums over the last axis of x and the first of kernel: (..., D), (D, ...) -> (..., ...).

    On a single CPU device its gradients are products of matrices. Of more axes, XLA copies the
    gradient, transposed, and then packs both factors: docs/LOG.md has the times.
    """
    return jnp.tensordot(x, kernel, 1)


def _gradients_of_product(saved, grad):
    x, kernel = saved

    def of_tensors(grad, x, kernel):
        (grad_x,) = jax.linear_transpose(lambda x: jnp.tensordot(x, kernel, 1), x)(grad)
        (grad_kernel,) = jax.linear_transpose(lambda k: jnp.tensordot(x, k, 1), kernel)(grad)
        return grad_x, grad_kernel

    def of_matrices(grad, x, kernel):
        kernel_DE = kernel.reshape(len(kernel), -1)
        x_ND = x.reshape(-1, kernel_DE.shape[0])
        grad_NE = grad.reshape(-1, kernel_DE.shape[1])
        return (grad_NE @ kernel_DE.T).reshape(x.shape), (x_ND.T @ grad_NE).reshape(kernel.shape)

    if jax.sharding.get_abstract_mesh().size > 1:  # axes split over devices are not merged
        return of_tensors(grad, x, kernel)
    # Not by the default backend: hubert plan compiles for TPUs on a CPU.
    return jax.lax.platform_dependent(grad, x, kernel, cpu=of_matrices, default=of_tensors)


# jnp's own in the forward pass: a remat policy does not see what `product` itself would compute.
product.defvjp(lambda x, kernel: (jnp.tensordot(x, kernel, 1), (x, kernel)), _gradients_of_product)


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
        return self.of_sum(x)

    def of_sum(self, x, branch=None, *, rate: float = 0.0, key=None):
        """Of x + dropout(branch, rate, key), which GPUs compute on the way."""
        if has_kernels(x.dtype):
            return self._by_kernel(x, branch, rate if key is not None else 0.0, key)
        if branch is not None:
            x = x + dropout(branch, rate, key)
        if x.dtype == jnp.float32:
            return _layer_norm(x, self.scale[...], self.bias[...])[0]
        return layer_norm_of_short(x, self.scale[...], self.bias[...])

    def _by_kernel(self, x, branch, rate: float, key):
        from hubert_jax import norms  # needs Pallas' Triton, which only GPUs do

        bits = None
        if branch is not None and rate:
            seeds_2 = jax.random.bits(key, (2,))
            bits = bits_of_rows(_row_numbers(x.shape), seeds_2)[..., 0]

        def norm(rows, scale, bias):
            shape = rows[0].shape
            x_ND, branch_ND, bits_N = (
                y if y is None else y.reshape(-1, *y.shape[len(shape) - 1 :]) for y in rows
            )
            y_ND = norms.layer_norm(x_ND, scale, bias, branch_ND, bits_N, rate=rate)
            return y_ND.reshape(shape)

        return on_own_rows(norm, (x, branch, bits), self.scale[...], self.bias[...])


def _layer_norm(x, scale, bias):
    x32 = x.astype(jnp.float32)
    mean = _mean_of_channels(x32)
    centred = x32 - mean
    variance = _mean_of_channels(jnp.square(centred))
    slope = jax.lax.rsqrt(variance + NORM_EPS)
    normed = centred * slope
    return (normed * scale + bias).astype(x.dtype), (x, mean, slope, scale)


@jax.custom_vjp
def layer_norm_of_short(x, scale, bias):
    """Of x in bfloat16: for the gradient it keeps x, which is half as long as what is made of it
    in float32 and would else be kept.
    """
    return _layer_norm(x, scale, bias)[0]


def _gradients_of_layer_norm(saved, grad):
    x, mean, slope, scale = saved
    grad32 = grad.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * slope
    scaled = grad32 * scale
    along = normed * _mean_of_channels(scaled * normed)
    grad_x = (scaled - _mean_of_channels(scaled) - along) * slope
    rows = tuple(range(x.ndim - 1))
    grad_scale = jnp.sum(grad32 * normed, axis=rows)
    return grad_x.astype(x.dtype), grad_scale, jnp.sum(grad32, axis=rows)


layer_norm_of_short.defvjp(_layer_norm, _gradients_of_layer_norm)


def _mean_of_channels(x):
    """On CPU the same bits in any batch: XLA adds up a row in an order that depends on how many
    rows there are, but not in a product with a matrix (a vector would not do either).
    """

    def by_product(x):
        return (x @ jnp.full((x.shape[-1], 4), 1 / x.shape[-1], x.dtype))[..., :1]

    def mean(x):
        return jnp.mean(x, axis=-1, keepdims=True)

    return jax.lax.platform_dependent(x, cpu=by_product, default=mean)


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
    """Zero a share `rate` of x and scale the rest; x itself without a key or a rate.

    What stays is a hash of where it is instead of jax.random's Threefry, which on CPU takes ten
    times as long as the softmax whose result it drops, and does not depend on how x is sharded.
    Good enough for dropout; masks are drawn elsewhere.
    """
    if key is None or rate == 0:
        return x
    seeds_2 = jax.random.bits(key, (2,))
    column = jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)
    keep = is_kept(bits_of_rows(_row_numbers(x.shape), seeds_2), column, rate)
    return jnp.where(keep, x * (1 / (1 - rate)), 0)


def _row_numbers(shape: tuple[int, ...]):
    """Of all rows in their order, the last axis being one row: uint32 (..., 1)."""
    row = jnp.zeros((*shape[:-1], 1), jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis)
    return row


def bits_of_rows(row, seeds_2):
    """What the columns of a row start from; rows by their number among all, uint32."""
    return _hash(row ^ seeds_2[0]) ^ seeds_2[1]


def is_kept(row_bits, column, rate: float):
    """Which columns of a row stay: those whose hash is at least `rate` of 2^32."""
    golden = jnp.uint32(0x9E3779B9)  # 2^32 divided by the golden ratio: neighbours end up far apart
    least = round(rate * 2**32)
    # The hash's last step mixes its upper half into the lower one, which counts only where the
    # upper one is that of `least`: that one will do, and in attention this is a tenth of the work.
    return _mixed(row_bits + column * golden) ^ jnp.uint32(least >> 16) >= jnp.uint32(least)


def _hash(x):
    """A bijection of uint32 that mixes all bits. Source: C. Wellons, hash-prospector, lowbias32."""
    x = _mixed(x)
    return x ^ (x >> 16)


def _mixed(x):
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)


@jax.custom_vjp
def gelu(x):
    """The exact GELU, x * Phi(x).

    Its slope is kept from the forward pass: one erf, not two. In bfloat16, x is kept, which need
    not be written: accelerators wait for memory and not for erf.
    """
    return gelu_and_slope(x)[0]


def gelu_and_slope(x):
    x32 = x.astype(jnp.float32)
    bell = jnp.exp(-0.5 * x32 * x32)
    if x.dtype == jnp.float32:
        phi = 0.5 * (1 + jax.lax.erf(x32 * math.sqrt(0.5)))
    else:
        phi = _phi(x32, bell)
    density = bell * (1 / math.sqrt(2 * math.pi))
    return (x32 * phi).astype(x.dtype), (phi + x32 * density).astype(x.dtype)


def _phi(x, bell):
    """The normal distribution's, off by 5e-7 at most, from the exponential that its density needs:
    a GPU's memory need not wait for it as it does for erf.

    Source: Abramowitz and Stegun, 7.1.26.
    """
    # A reciprocal, but without the division that a GPU takes ten instructions for.
    t = jnp.square(jax.lax.rsqrt(1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(x)))
    curve = (
        ((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736
    ) * t + 0.254829592
    tail = 0.5 * bell * t * curve
    return jnp.where(x < 0, tail, 1 - tail)


def _forward_of_gelu(x):
    y, slope = gelu_and_slope(x)
    return y, (slope if x.dtype == jnp.float32 else x)


def _gradient_of_gelu(kept, grad):
    slope = kept if kept.dtype == jnp.float32 else gelu_and_slope(kept)[1]
    return (grad * slope,)


gelu.defvjp(_forward_of_gelu, _gradient_of_gelu)


@jax.custom_vjp
def scale_gradient(x, scale: float):
    """x forwards, `scale` times the gradient backwards."""
    return x


scale_gradient.defvjp(lambda x, scale: (x, scale), lambda scale, grad: (grad * scale, None))
