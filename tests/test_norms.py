# SPDX-License-Identifier: Apache-2.0
"""Layer norms by kernels, interpreted on the CPU, are those of layers.LayerNorm.

N rows, D width
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import blocks, layers, norms
from tests.cuda import lowered

KEY = jax.random.key(7)


def arrays(num_rows: int, width: int, dtype=jnp.float32):
    """x, branch, a gradient, scale and bias; rows have means and sizes of their own."""
    keys = jax.random.split(jax.random.key(0), 6)
    x, branch, grad = (jax.random.normal(key, (num_rows, width), dtype) for key in keys[:3])
    sizes = jnp.exp(jax.random.normal(keys[3], (num_rows, 1), dtype))
    scale, bias = jax.random.normal(keys[4], (2, width))
    return (3 + x) * sizes, branch * sizes, grad, scale, bias


def by_kernels(x, branch, scale, bias, *, rate: float):
    seeds_2 = jax.random.bits(KEY, (2,))
    bits_N = layers.bits_of_rows(jnp.arange(len(x), dtype=jnp.uint32), seeds_2)
    return norms.layer_norm(x, scale, bias, branch, bits_N, rate=rate, interpret=True)


def plain(x, branch, scale, bias, *, rate: float):
    return layers._layer_norm(x + layers.dropout(branch, rate, KEY), scale, bias)[0]


def with_gradients(norm, grad, *args):
    y, pull = jax.vjp(norm, *args)
    return y, *pull(grad)


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * jnp.abs(b).max())


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 16), (13, 24), (37, 100)])
def test_of_a_sum_with_what_dropout_leaves(num_rows, width, rate, monkeypatch):
    """Widths that are no power of two, and rows for several turns of a program."""
    monkeypatch.setattr(blocks, "PROGRAMS", 3)
    x, branch, grad, scale, bias = arrays(num_rows, width)
    norm = functools.partial(by_kernels, rate=rate)
    got = with_gradients(norm, grad, x, branch, scale, bias)
    want = with_gradients(functools.partial(plain, rate=rate), grad, x, branch, scale, bias)
    assert_close(got, want)
    other = plain(x, branch, scale, bias, rate=0.3 - rate)
    assert jnp.abs(got[0] - other).max() > 0.01


def test_of_x_alone():
    x, _, grad, scale, bias = arrays(13, 24)
    norm = functools.partial(norms.layer_norm, interpret=True)
    got = with_gradients(norm, grad, x, scale, bias)
    assert_close(got, with_gradients(lambda *a: layers._layer_norm(*a)[0], grad, x, scale, bias))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_bfloat16_is_no_further_from_float32_than_the_plain_norm(rate):
    x, branch, grad, scale, bias = arrays(64, 96, jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in (grad, x, branch, scale, bias)]
    want = with_gradients(functools.partial(plain, rate=rate), *exact)
    norm = functools.partial(by_kernels, rate=rate)
    got = with_gradients(norm, grad, x, branch, scale, bias)
    other = with_gradients(functools.partial(plain, rate=rate), grad, x, branch, scale, bias)
    for a, b, c in zip(got, other, want, strict=True):
        assert a.dtype == b.dtype
        errors = [float(jnp.linalg.norm(y.astype(jnp.float32) - c)) for y in (a, b)]
        assert errors[0] <= 1.05 * errors[1] + 1e-5 * jnp.linalg.norm(c)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_they_lower_for_cuda(checked_kernels):
    x = jax.ShapeDtypeStruct((99_968, 768), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((768,), jnp.float32)
    bits = jax.ShapeDtypeStruct((99_968,), jnp.uint32)

    def both(x, branch, scale, bias, bits, grad):
        def norm(x, branch, scale, bias):
            return norms.layer_norm(x, scale, bias, branch, bits, rate=0.1)

        return with_gradients(norm, grad, x, branch, scale, bias)

    text = lowered(both, x, x, scale, scale, bits, x)
    assert text.count("xla.gpu.triton") == len(checked_kernels) == 2
