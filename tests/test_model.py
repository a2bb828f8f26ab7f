# SPDX-License-Identifier: Apache-2.0
"""The encoder does things in the reference's order, and its modes compute the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hubert_jax import heads, weights
from hubert_jax.layers import gelu, scale_gradient
from hubert_jax.ops import frames, losses
from hubert_jax.positions import PositionConv
from tests import tiny

SAMPLES = 12_800
WAVE_BS = np.random.default_rng(0).normal(size=(2, SAMPLES)).astype(np.float32)
T = frames.num_frames(SAMPLES)


@pytest.fixture(params=tiny.KINDS)
def encoder(request):
    return tiny.model(tiny.KINDS[request.param]).encoder


# --- from frames to layers, in this order


def test_frames_are_those_of_the_arithmetic(encoder):
    assert tiny.extract(encoder, WAVE_BS).shape == (2, T, 16)
    assert tiny.features(encoder, WAVE_BS, layer=0).shape == (2, T, 32)


def test_base_ignores_gain_and_offset_and_large_hears_the_offset():
    base, large = (
        functools.partial(tiny.extract, tiny.model(config).encoder)
        for config in (tiny.BASE, tiny.LARGE)
    )
    louder_BS = 3.0 * WAVE_BS + 1.0
    np.testing.assert_allclose(base(louder_BS), base(WAVE_BS), atol=1e-4)
    assert np.abs(large(louder_BS) - large(WAVE_BS)).max() > 1e-3


def test_gradient_scale_reaches_the_convolutions_and_the_penalty_alone():
    """The penalty comes after the scale: its gradient is scaled too; nothing else changes."""

    @functools.cache
    def gradient(scale, loss):
        model = tiny.model(dataclasses.replace(tiny.BASE, gradient_scale=scale))
        return jax.jit(jax.grad(loss))(model.encoder)

    def task(encoder):
        return jnp.sum(jnp.sin(tiny.contextualize(encoder, tiny.extract(encoder, WAVE_BS))))

    def penalty(encoder):
        return losses.feature_penalty(tiny.extract(encoder, WAVE_BS))

    for loss in (task, penalty):
        one, eighth = gradient(1.0, loss), gradient(0.125, loss)  # which floats scale by exactly
        for conv_one, conv_eighth in zip(one.extractor.convs, eighth.extractor.convs, strict=True):
            np.testing.assert_array_equal(0.125 * conv_one.kernel[...], conv_eighth.kernel[...])
        np.testing.assert_array_equal(one.projection.kernel[...], eighth.projection.kernel[...])


def test_a_masked_frame_shows_nothing_of_the_audio(encoder):
    mask_BT = jnp.ones((2, T), bool)
    conv_BTC = tiny.extract(encoder, WAVE_BS)
    hidden = tiny.contextualize(encoder, conv_BTC, mask_BT=mask_BT)
    np.testing.assert_array_equal(hidden, tiny.contextualize(encoder, -conv_BTC, mask_BT=mask_BT))
    # one visible frame is seen by all
    seen = tiny.contextualize(encoder, conv_BTC, mask_BT=mask_BT.at[:, 7].set(False))
    assert (np.abs(seen - hidden).max(axis=-1) > 1e-6).all()


def test_masking_comes_after_the_input_dropout():
    config = dataclasses.replace(tiny.BASE, input_dropout=0.5)
    encoder = tiny.model(config).encoder
    conv_BTC, mask_BT = tiny.extract(encoder, WAVE_BS), jnp.ones((2, T), bool)
    draws = [
        tiny.contextualize(encoder, conv_BTC, mask_BT=mask_BT, key=jax.random.key(i))
        for i in (0, 1)
    ]
    np.testing.assert_array_equal(*draws)
    visible = [tiny.contextualize(encoder, conv_BTC, key=jax.random.key(i)) for i in (0, 1)]
    assert np.abs(visible[0] - visible[1]).max() > 1e-3


def test_position_convolution_sees_64_frames_back_and_63_ahead():
    conv = PositionConv(tiny.BASE, key=jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (1, 200, 32))
    at = 100
    gradient_BTD = jax.jit(jax.grad(lambda x: conv(x)[0, at].sum()))(x_BTD)
    seen_T = np.abs(gradient_BTD[0]).sum(axis=-1) > 0
    assert np.flatnonzero(seen_T)[[0, -1]].tolist() == [at - 64, at + 63]


@pytest.mark.parametrize("num_frames", [1, 7, 8, 37, 130])
def test_position_convolution_is_a_grouped_convolution(num_frames):
    conv = PositionConv(tiny.BASE, key=jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (2, num_frames, 32))
    want_BTD = jax.lax.conv_general_dilated(
        x_BTD, conv.weight(), (1,), [(64, 63)], dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=tiny.BASE.position_groups,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(conv)(x_BTD), gelu(want_BTD + conv.bias[...]), atol=1e-5)


def test_position_kernel_starts_normalised():
    conv = PositionConv(tiny.BASE, key=jax.random.key(0))
    np.testing.assert_allclose(conv.weight(), conv.kernel[...], rtol=1e-5)
    np.testing.assert_allclose(np.std(conv.kernel[...]), np.sqrt(4 / (128 * 32)), rtol=0.05)


def test_layer_l_needs_only_the_first_l_layers(encoder):
    def spoiled_after(layer):
        return jax.tree.map(lambda p: p.at[layer:].set(jnp.nan), encoder.layers)

    for layer in range(encoder.config.num_layers + 1):
        want = tiny.features(encoder, WAVE_BS, layer=layer)
        kept = encoder.layers
        encoder.layers = spoiled_after(layer)
        np.testing.assert_array_equal(tiny.features(encoder, WAVE_BS, layer=layer), want)
        encoder.layers = kept


def test_layers_apart_are_the_same():
    encoder = tiny.model(dataclasses.replace(tiny.BASE, unroll="yes")).encoder
    apart = encoder.apart()
    for layer in (1, tiny.BASE.num_layers):
        want = tiny.features(encoder, WAVE_BS, layer=layer)
        np.testing.assert_array_equal(tiny.features(apart, WAVE_BS, layer=layer), want)
    assert isinstance(apart.layers, nnx.List) and apart.apart() is apart
    assert weights.to_named(encoder).keys() == weights.to_named(tiny.model().encoder).keys()


def test_layers_that_are_scanned_stay_together():
    encoder = tiny.model(dataclasses.replace(tiny.BASE, unroll="no")).encoder
    assert encoder.apart() is encoder


def test_last_norm_belongs_to_the_output_and_not_to_the_features():
    for config, differs in ((tiny.BASE, False), (tiny.LARGE, True)):
        encoder = tiny.model(config).encoder
        output = tiny.contextualize(encoder, tiny.extract(encoder, jnp.asarray(WAVE_BS)))
        features = tiny.features(encoder, WAVE_BS, layer=config.num_layers)
        assert (np.abs(output - features).max() > 1e-3) == differs


def test_an_impossible_layer_is_named(encoder):
    with pytest.raises(ValueError, match="layer 4: this model has layers 0 to 3"):
        tiny.features(encoder, WAVE_BS, layer=4)


# --- padding


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_exact_padding_gives_an_utterance_the_same_features_in_any_batch(kind):
    encoder = tiny.model(tiny.KINDS[kind]).encoder
    rng = np.random.default_rng(3)
    lengths_B = np.array([400, 9_999, SAMPLES])
    waves = [rng.normal(size=n).astype(np.float32) for n in lengths_B]
    padded_BS = np.stack([np.pad(wave, (0, SAMPLES - len(wave))) for wave in waves])
    together = all_layers(encoder, padded_BS, lengths_B)
    for row, wave_S in enumerate(waves):
        alone = all_layers(encoder, wave_S[None], None)
        for batch_BTD, alone_BTD in zip(together, alone, strict=True):
            num_frames = alone_BTD.shape[1]
            np.testing.assert_allclose(batch_BTD[row, :num_frames], alone_BTD[0], atol=1e-5)


@jax.jit
def all_layers(encoder, wave_BS, num_samples_B):
    layers = range(encoder.config.num_layers + 1)
    return [encoder.features(wave_BS, layer=n, num_samples_B=num_samples_B) for n in layers]


def test_reference_padding_differs_for_base():
    encoder = tiny.model(tiny.BASE).encoder
    padded_BS = np.pad(WAVE_BS, ((0, 0), (0, SAMPLES)))
    lengths_B = np.full(2, SAMPLES)
    exact, reference = (
        tiny.features(encoder, padded_BS, layer=1, num_samples_B=lengths_B, padding=padding)[:, :T]
        for padding in ("exact", "reference")
    )
    assert np.abs(exact - reference).max() > 1e-3


# --- modes


def loss_and_gradient(model, key=None):
    def loss(model):
        logits, penalty = model(WAVE_BS, jnp.zeros((2, T), bool).at[:, ::3].set(True), key=key)
        return jnp.mean(logits[0] ** 2) + penalty

    return jax.value_and_grad(loss), model


@pytest.mark.parametrize(("kind", "dropout"), [("base", 0.1), ("large", 0.0)])
def test_scan_equals_loop_and_remat_equals_none(kind, dropout):
    plain = dataclasses.replace(tiny.KINDS[kind], num_layers=2, dropout=dropout, layer_drop=dropout)
    modes = [
        plain,
        dataclasses.replace(plain, unroll="yes"),
        dataclasses.replace(plain, remat="layer"),
        dataclasses.replace(plain, remat="dots"),
        dataclasses.replace(plain, unroll="yes", remat="layer"),
    ]
    key = jax.random.key(5) if dropout else None
    programs, results = set(), []
    for config in modes:
        function, model = loss_and_gradient(tiny.model(config), key)
        programs.add(str(jax.make_jaxpr(function)(model)))
        results.append(jax.tree.leaves(jax.jit(function)(model)))
    assert len(programs) == len(modes)  # they are five programs, so the comparison means something
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


def test_layer_drop_skips_whole_layers_of_the_batch():
    config = dataclasses.replace(tiny.LARGE, layer_drop=1.0)
    model = tiny.model(config)
    conv_BTC = tiny.extract(model.encoder, WAVE_BS)
    dropped = tiny.contextualize(model.encoder, conv_BTC, num_layers=3, key=jax.random.key(0))
    np.testing.assert_array_equal(
        dropped, tiny.contextualize(model.encoder, conv_BTC, num_layers=0)
    )


def test_bfloat16_stays_near_float32_and_keeps_float32_parameters():
    half = tiny.model(dataclasses.replace(tiny.BASE, compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    assert tiny.extract(half.encoder, WAVE_BS).dtype == jnp.bfloat16
    exact = tiny.features(tiny.model(tiny.BASE).encoder, WAVE_BS, layer=3)
    difference = np.abs(tiny.features(half.encoder, WAVE_BS, layer=3) - exact)
    assert 1e-4 < difference.max() < 0.2


# --- parts


def test_gelu_is_exact_in_value_and_slope():
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    want = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), want, atol=1e-6)
    assert np.abs(gelu(x) - jax.nn.gelu(x)).max() > 1e-4  # not the tanh form


def test_scale_gradient():
    value, slope = jax.value_and_grad(lambda x: scale_gradient(x, 0.1) ** 2)(3.0)
    assert value == 9.0 and float(slope) == pytest.approx(0.6)


def test_initial_values():
    model = heads.Hubert(tiny.BASE, tiny.HEAD, (50,), key=jax.random.key(0))
    block, head = model.encoder.layers, model.head
    assert np.std(block.ffn_in.kernel[...]) == pytest.approx(0.02, rel=0.05)
    assert not block.ffn_in.bias[...].any()
    kernel = model.encoder.extractor.convs[2].kernel[...]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (3 * 16)), rel=0.1)
    bound = 1 / np.sqrt(16)
    projection = model.encoder.projection.kernel[...]
    assert bound * 0.9 < np.abs(projection).max() <= bound
    assert head.codes_CE[...].min() >= 0 and head.codes_CE[...].max() <= 1
    assert model.encoder.mask_embedding_D[...].min() >= 0


def test_several_label_sets_tied_and_untied():
    mask_BT = jnp.zeros((2, T), bool)
    for untied in (False, True):
        head = dataclasses.replace(tiny.HEAD, untied=untied)
        model = tiny.model(tiny.BASE, num_codes=(12, 7), head=head)
        logits, _ = jax.jit(model)(WAVE_BS, mask_BT)
        assert [x.shape for x in logits] == [(2, T, 12), (2, T, 7)]
        assert model.head.kernel[...].shape == (2 if untied else 1, 32, 8)
        assert model.head.codes_CE[...].shape == (19, 8)


@pytest.mark.parametrize(("backend", "loops"), [("cpu", True), ("gpu", True), ("tpu", False)])
def test_layers_are_scanned_on_tpus_alone(backend, loops, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert dataclasses.replace(tiny.BASE, unroll="auto").loops == loops
