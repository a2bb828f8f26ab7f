# SPDX-License-Identifier: Apache-2.0
"""Convolutions of which each platform has forms of its own.

B batch, T frames, C channels, D channels of an output, K taps
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import convolutions, layers, positions
from tests import tiny

# --- strided convolutions: gradients that are written by hand


@pytest.mark.parametrize("num_frames", (20, 21, 22, 23))
@pytest.mark.parametrize("num_taps, stride", ((3, 2), (2, 2), (10, 5), (5, 3)))
def test_gradients_of_a_strided_convolution_are_those_that_jax_derives(
    num_frames, num_taps, stride
):
    x_BTC = jax.random.normal(jax.random.key(0), (2, num_frames, 3))
    kernel = jax.random.normal(jax.random.key(1), (num_taps, 3, 4))

    def plain(x_BTC, kernel, stride):
        return jax.lax.conv_general_dilated(
            x_BTC, kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def gradients(conv):
        loss = lambda x_BTC, kernel: jnp.sum(jnp.sin(conv(x_BTC, kernel, stride)))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(x_BTC, kernel)

    got, want = convolutions.strided_conv(x_BTC, kernel, stride), plain(x_BTC, kernel, stride)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    for got, want in zip(gradients(convolutions.strided_conv), gradients(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_gradients_of_a_convolution_without_frames_are_zeros():
    x_BTC, kernel = jnp.ones((2, 2, 3)), jnp.ones((3, 3, 4))
    total = lambda x, kernel: jnp.sum(convolutions.strided_conv(x, kernel, 2))  # noqa: E731
    for got in jax.grad(total, argnums=(0, 1))(x_BTC, kernel):
        assert not got.any()


# --- group norm: its mean from the samples, its variance in stretches, then in the kernel


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("lengths", (None, (5000, 77)))
def test_group_norm_normalises_what_a_convolution_makes_of_a_waveform(lengths, bias):
    """Also where the samples have a mean of their own, and the channels very different sizes."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    sizes_C = jnp.geomspace(1e-2, 1e2, 8)
    conv = convolutions.Conv(1, 8, 10, 5, bias=bias, key=next(keys))
    norm = convolutions.GroupNorm(8)
    norm.scale[...], norm.bias[...] = jax.random.normal(next(keys), (2, 8))
    wave_BS = 0.5 + 0.1 * jax.random.normal(next(keys), (2, 3 * 5 * convolutions.STRETCH + 2_003))
    lengths_B = None if lengths is None else jnp.array(lengths)
    weights_BTC = jax.random.normal(next(keys), (2, (wave_BS.shape[1] - 10) // 5 + 1, 8))

    def plain(conv, norm):
        y_BTC = conv(wave_BS[..., None])
        counts_B = jnp.full(2, y_BTC.shape[1]) if lengths is None else lengths_B
        real_BT1 = (jnp.arange(y_BTC.shape[1]) < counts_B[:, None])[..., None]
        mean_B1C = jnp.mean(y_BTC, axis=1, keepdims=True, where=real_BT1)
        variance_B1C = jnp.var(y_BTC, axis=1, keepdims=True, where=real_BT1)
        normed_BTC = (y_BTC - mean_B1C) * jax.lax.rsqrt(variance_B1C + layers.NORM_EPS)
        return normed_BTC * norm.scale[...] + norm.bias[...]

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradients(normalised, conv, norm):
        def mean(conv, norm):
            y_BTC = normalised(sized(conv, sizes_C), norm)
            return jnp.mean(jnp.sin(y_BTC) * weights_BTC), y_BTC

        gradients, y_BTC = jax.grad(mean, argnums=(0, 1), has_aux=True)(conv, norm)
        return y_BTC, jax.tree.leaves(gradients)

    ours = output_and_gradients(lambda conv, norm: norm(conv, wave_BS, lengths_B), conv, norm)
    theirs = output_and_gradients(plain, conv, norm)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=2e-5)  # values of up to 13
    for got, want in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def sized(conv, sizes_C):
    """The convolution with channels of other sizes."""
    return jax.tree.map(lambda param: param * sizes_C, conv)


def test_group_norm_of_a_row_without_frames_is_finite():
    conv = convolutions.Conv(1, 8, 10, 5, bias=False, key=jax.random.key(0))
    wave_BS = jnp.ones((2, 400))
    y_BTC = convolutions.GroupNorm(8)(conv, wave_BS, jnp.array([0, 79]))
    assert np.isfinite(y_BTC).all()


# --- forms for GPUs and CPUs


@pytest.mark.parametrize("platform", ("cpu", "tpu", "cuda"))
def test_what_is_compiled_for_another_platform_here_has_no_form_for_cpus(platform):
    norm = layers.LayerNorm(8)
    kernel = jnp.ones((3, 8, 8))

    def convolved(x_BTC, kernel=kernel):
        return jnp.sum(jnp.sin(convolutions.strided_conv(x_BTC, kernel, 2)))

    gradient = jax.grad(convolved)
    of_kernel = functools.partial(jax.grad(convolved, argnums=1), jnp.ones((2, 21, 8)))

    def lowered(function, *args) -> str:
        traced = jax.jit(function).trace(*args or (jnp.ones((2, 21, 8)),))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def doubled(x_BTC):
        return layers.one_by_one(lambda x_TC: 2 * x_TC, x_BTC)

    def multiplied(x_BTC):
        kernel = jnp.ones((8, 3, 4))
        return jax.grad(lambda kernel: jnp.sum(layers.product(x_BTC, kernel)))(kernel)

    assert ("while" in lowered(doubled)) == (platform == "cpu")
    assert ("tensor<42x8xf32>" in lowered(multiplied)) == (platform == "cpu")
    assert ("dot_general" in lowered(norm)) == (platform == "cpu")
    assert ("lhs_dilate = [2]" in lowered(gradient)) == (platform == "tpu")
    for text in (lowered(convolved), lowered(gradient), lowered(of_kernel, kernel)):
        assert ("convolution" in text) == (platform != "cuda")
    assert ("dot_general" in lowered(of_kernel, kernel)) == (platform != "tpu")


@pytest.mark.parametrize(
    ("taps", "stride", "width", "num_samples"),
    [(3, 2, 8, 101), (3, 2, 8, 100), (2, 2, 8, 31), (10, 5, 1, 403), (10, 5, 1, 400), (4, 3, 2, 4)],
)
def test_a_convolution_by_product_is_the_convolution(taps, stride, width, num_samples):
    """As are its gradients: the form for NVIDIA GPUs."""
    x_BTC = jax.random.normal(jax.random.key(0), (2, num_samples, width))
    kernel = jax.random.normal(jax.random.key(1), (taps, width, 16))

    def value_and_gradients(form):
        y_BTC, pull = jax.vjp(lambda x, k: form(x, k, stride), x_BTC, kernel)
        return y_BTC, *pull(jnp.sin(jnp.arange(y_BTC.size).reshape(y_BTC.shape)))

    got, want = map(value_and_gradients, (convolutions._by_product, convolutions._conv))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
    grad_BTD = jnp.sin(jnp.arange(want[0].size).reshape(want[0].shape))
    for of_input in (convolutions._input_gradient_by_product, convolutions._input_gradient):
        got_BTC = of_input(grad_BTD, kernel, stride=stride, num_frames=num_samples)
        np.testing.assert_allclose(got_BTC, want[1], atol=3e-5)


# --- the variance of GroupNorm, for NVIDIA's GPUs


def statistics(how, windows_TK, weights_T1, kernel_KC):
    """Mean and variance, and a gradient of the latter."""

    def total(kernel_KC):
        mean_K, variance_C = how(windows_TK, weights_T1, kernel_KC)
        return jnp.sum(jnp.log(variance_C)), (mean_K, variance_C)

    grad_KC, both = jax.grad(total, has_aux=True)(kernel_KC)
    return *both, grad_KC


BY_CHANNEL = functools.partial(convolutions._by_channel, dtype=jnp.float32)


@pytest.mark.parametrize("taps", [10, 15])
def test_a_variance_is_the_same_from_sums_over_windows(taps):
    keys = jax.random.split(jax.random.key(0), 2)
    windows_TK = 0.5 + jax.random.normal(keys[0], (convolutions.STRETCH + 77, taps))
    kernel_KC = jax.random.normal(keys[1], (taps, 8)) * jnp.geomspace(1e-2, 1e2, 8)
    weights_T1 = jnp.where(jnp.arange(len(windows_TK)) < 2_000, 1 / 2_000, 0)[:, None]
    args = windows_TK, weights_T1, kernel_KC
    for got, want in zip(
        statistics(convolutions._by_products, *args), statistics(BY_CHANNEL, *args), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_a_variance_of_a_tone_that_kernels_let_nothing_of_through_is_not_below_zero():
    """All of it cancels: what is left is float32's rounding, of either sign."""
    wave_S = 10 * jnp.sin(2 * jnp.pi * 80 / 16_000 * jnp.arange(50_010))
    windows_TK = convolutions._windows(wave_S[None], 10, 5)[0]
    kernel_KC = jax.random.normal(jax.random.key(0), (10, 512))
    kernel_KC -= kernel_KC.mean(axis=0)
    ramp_K1 = jnp.linspace(-1, 1, 10)[:, None]
    kernel_KC -= ramp_K1 * jnp.sum(kernel_KC * ramp_K1, axis=0) / jnp.sum(jnp.square(ramp_K1))
    weights_T1 = jnp.full((len(windows_TK), 1), 1 / len(windows_TK))
    # In a program, as in a step: by itself a product of jax 0.12 has 20 times the rounding on CPUs.
    _, variance_C = jax.jit(convolutions._by_products)(windows_TK, weights_T1, kernel_KC)
    _, exact_C = BY_CHANNEL(windows_TK, weights_T1, kernel_KC)
    assert (variance_C >= 0).all() and jnp.abs(variance_C - exact_C).max() < 1e-3
    assert (exact_C < 1e-6 * jnp.square(wave_S).mean()).any()
    assert (variance_C == 0).any()


# --- the position convolution, for NVIDIA's GPUs


def test_a_position_convolution_by_places_is_the_one_by_pieces(monkeypatch):
    position = positions.PositionConv(tiny.BASE, key=jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 77, tiny.BASE.width))
    grad_BTD = jnp.sin(jnp.arange(x_BTD.size).reshape(x_BTD.shape))

    def with_gradients():
        y_BTD, pull = jax.vjp(position._convolve, x_BTD, position.weight())
        return y_BTD, *pull(grad_BTD)

    want = with_gradients()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    got = with_gradients()
    assert (got[0] != want[0]).any()  # sums in another order
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * jnp.abs(b).max())
