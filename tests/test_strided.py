# SPDX-License-Identifier: Apache-2.0
"""Strided convolutions by kernels, interpreted on the CPU, are those of XLA.

B batch, T frames, C channels, D channels of the output
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import strided
from tests.cuda import lowered

TILES = strided.Tiles(rows=16, columns=16, depth=16, num_warps=4, num_stages=2)
SMALL = {"tiles": TILES, "interpret": True}


def conv(x_BTC, kernel, stride: int):
    return jax.lax.conv_general_dilated(
        x_BTC, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


def arrays(taps: int, stride: int, num_frames: int, dtype=jnp.float32):
    """x (B, T, 48), a kernel to 32 channels, a gradient of that, the slope of what x is of."""
    keys = jax.random.split(jax.random.key(0), 4)
    num_out = (num_frames - taps) // stride + 1
    shapes = (2, num_frames, 48), (taps, 48, 32), (2, num_out, 32), (2, num_frames, 48)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def by_kernels(x_BTC, kernel, grad_BTD, slope_BTC, *, stride: int):
    taps = len(kernel)
    gradients = strided.kernel_gradient(x_BTC, grad_BTD, taps=taps, stride=stride, **SMALL)
    return (
        strided.output(x_BTC, kernel, stride=stride, **SMALL),
        strided.input_gradient(grad_BTD, kernel, slope_BTC, stride=stride, **SMALL),
        jnp.sum(gradients, axis=0),
    )


def by_xla(x_BTC, kernel, grad_BTD, slope_BTC, *, stride: int):
    y_BTD, pull = jax.vjp(lambda x, k: conv(x, k, stride), x_BTC, kernel)
    grad_BTC, grad_kernel = pull(grad_BTD)
    return y_BTD, grad_BTC * slope_BTC, grad_kernel


@pytest.mark.parametrize("num_frames", [6, 32, 33, 34, 101])
@pytest.mark.parametrize(("taps", "stride"), [(3, 2), (2, 2), (5, 3), (1, 1)])
def test_a_convolution_and_its_gradients_are_xlas(taps, stride, num_frames):
    """Also where the last frames of x are seen by no frame of the output, or by one of two taps."""
    args = arrays(taps, stride, num_frames)
    got, want = by_kernels(*args, stride=stride), by_xla(*args, stride=stride)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * jnp.abs(b).max())


def test_bfloat16_is_close_to_float32():
    args = arrays(3, 2, 101, jnp.bfloat16)
    want = by_xla(*(x.astype(jnp.float32) for x in args), stride=2)
    types = jnp.bfloat16, jnp.bfloat16, jnp.float32  # gradients of a kernel are still to be summed
    for a, b, dtype in zip(by_kernels(*args, stride=2), want, types, strict=True):
        assert a.dtype == dtype
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.005 * jnp.linalg.norm(b)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("width", [128, 384, 512])
@pytest.mark.parametrize("taps", [2, 3])
def test_they_lower_for_cuda_with_the_blocks_they_have(width, taps, checked_kernels):
    """128 rows of 15.6 s are more bytes than 32 bits can count."""
    x = jax.ShapeDtypeStruct((128, 49_999, width), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((taps, width, width), jnp.bfloat16)
    grad = jax.ShapeDtypeStruct((128, (49_999 - taps) // 2 + 1, width), jnp.bfloat16)

    def all_of_them(x, kernel, grad):
        return (
            strided.output(x, kernel, stride=2),
            strided.input_gradient(grad, kernel, x, stride=2),
            strided.kernel_gradient(x, grad, taps=taps, stride=2),
        )

    assert lowered(all_of_them, x, kernel, grad).count("xla.gpu.triton") == 3
    assert len(checked_kernels) == 3
