# SPDX-License-Identifier: Apache-2.0
"""GELU by kernels, interpreted on the CPU, is that of layers.gelu.

N rows, D width
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import blocks, gelus, layers
from tests.cuda import lowered


def arrays(num_rows: int, width: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x, grad = (2 * jax.random.normal(key, (num_rows, width), dtype) for key in keys[:2])
    return x, jax.random.normal(keys[2], (width,)), grad


def with_gradients(function, grad, *args):
    y, pull = jax.vjp(function, *args)
    return y, *pull(grad)


@pytest.mark.parametrize(("num_rows", "width"), [(1, 16), (700, 24), (13, 3072)])
def test_of_a_sum(num_rows, width, monkeypatch):
    """Also of several blocks of columns, and rows for several turns of a program."""
    monkeypatch.setattr(blocks, "PROGRAMS", 2)
    x, bias, grad = arrays(num_rows, width)
    got = with_gradients(lambda x, b: gelus.gelu_of_sum(x, b, True), grad, x, bias)
    want = with_gradients(lambda x, b: layers.gelu(x + b), grad, x, bias)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * jnp.abs(b).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_with_its_slope(dtype):
    x, _, _ = arrays(130, 48, dtype)
    for got, want in zip(
        gelus.with_slope(x, interpret=True), layers.gelu_and_slope(x), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_bfloat16_is_close_to_float32():
    x, bias, grad = arrays(130, 48, jnp.bfloat16)
    got = with_gradients(lambda x, b: gelus.gelu_of_sum(x, b, True), grad, x, bias)
    exact = (a.astype(jnp.float32) for a in (grad, x, bias))
    want = with_gradients(lambda x, b: layers.gelu(x + b), *exact)
    for a, b, dtype in zip(got, want, (jnp.bfloat16, jnp.bfloat16, jnp.float32), strict=True):
        assert a.dtype == dtype
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.005 * jnp.linalg.norm(b)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_they_lower_for_cuda(checked_kernels):
    x = jax.ShapeDtypeStruct((99_968, 3072), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((3072,), jnp.float32)
    large = jax.ShapeDtypeStruct((128 * 50_000, 512), jnp.bfloat16)  # more bytes than 32 bits count

    def all_of_them(x, bias, grad, large):
        return with_gradients(gelus.gelu_of_sum, grad, x, bias), gelus.with_slope(large)

    text = lowered(all_of_them, x, bias, x, large)
    assert text.count("xla.gpu.triton") == len(checked_kernels) == 3
