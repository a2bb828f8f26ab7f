# SPDX-License-Identifier: Apache-2.0
"""The model as NVIDIA's GPUs compute it, its kernels interpreted on the CPU, is the model.

B batch, S samples, T frames
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import convolutions, layers, optim, positions, pretraining, train
from hubert_jax.ops import frames
from tests import tiny
from tests.test_sharding import OPTIM, batch

# As narrow as the kernels take it, and with everything that is dropped.
WIDTHS = {
    "conv_width": 128, "width": 64, "ffn_width": 128, "num_layers": 2, "unroll": "yes",
    "dropout": 0.1, "attention_dropout": 0.1, "input_dropout": 0.1,
}  # fmt: skip
LOSS = pretraining.LossConfig(penalty=10.0, unmasked_weight_start=1.0, unmasked_weight_end=0.0)
NUM_SAMPLES = 7_000  # frames of 1399, which is odd, down to 21


def config(kind: str, dtype: str):
    return dataclasses.replace(tiny.KINDS[kind], **WIDTHS, compute_dtype=dtype)


def loss_and_gradients(kind: str, dtype: str):
    model = tiny.model(config(kind, dtype))
    num_frames = frames.num_frames(NUM_SAMPLES)
    given = {
        "audio": 0.3 + jax.random.normal(jax.random.key(1), (2, NUM_SAMPLES)),
        "labels": jax.random.randint(jax.random.key(2), (2, num_frames, 1), 0, 12),
        "weights": jnp.ones(2),
    }

    @jax.jit
    def run(model, batch):
        def total(model):
            value = pretraining.loss(model, given, jax.random.key(3), 5, config=LOSS, num_steps=10)
            return value.total / value.weight

        return jax.value_and_grad(total)(model)

    loss, grads = run(model, batch)
    return float(loss), {jax.tree_util.keystr(k): g for k, g in jax.tree.leaves_with_path(grads)}


def error(got, want) -> float:
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_step_is_no_further_from_float32_than_without_kernels(kind, request):
    """The same masks and dropout in all three; the order of sums and what is rounded differ."""
    want_loss, want = loss_and_gradients(kind, "float32")
    plain_loss, plain = loss_and_gradients(kind, "bfloat16")
    request.getfixturevalue("hopper")
    names = request.getfixturevalue("interpreted")
    loss, grads = loss_and_gradients(kind, "bfloat16")
    used = {"mix", "key_gradients", "query_gradients", "conv", "conv_input", "conv_kernel"}
    used |= {"normalise", "norm_gradients", "gelu_of_sum", "gelu_gradient", "gelu_and_slope"}
    assert names == used
    assert loss != plain_loss
    assert abs(loss - want_loss) <= abs(plain_loss - want_loss) + 1e-3 * want_loss
    whole = [error(*map(flat, pair)) for pair in ((grads, want), (plain, want))]
    assert whole[0] <= 1.3 * whole[1]  # XLA on a CPU rounds less of the other
    assert whole[1] < 0.05


def flat(grads):
    return jnp.concatenate([grads[name].ravel() for name in sorted(grads)])


def test_features_of_padded_rows_too(request):
    """And there are as many frames as on a CPU, whatever the convolutions were padded to."""
    lengths = jnp.array([NUM_SAMPLES, 5_000])
    wave_BS = jax.random.normal(jax.random.key(1), (2, NUM_SAMPLES))
    wave_BS *= jnp.arange(NUM_SAMPLES) < lengths[:, None]

    def features(dtype: str):
        encoder = tiny.model(config("base", dtype)).encoder
        run = functools.partial(tiny.features, layer=2, num_samples_B=lengths)
        return run(encoder, wave_BS)

    want_BTD, plain_BTD = features("float32"), features("bfloat16")
    request.getfixturevalue("hopper")
    request.getfixturevalue("interpreted")
    jax.clear_caches()
    got_BTD = features("bfloat16")
    assert got_BTD.shape == want_BTD.shape
    assert (got_BTD != plain_BTD).any()
    for row, num_frames in enumerate(frames.num_frames(np.asarray(lengths))):
        got, plain, want = (x[row, :num_frames] for x in (got_BTD, plain_BTD, want_BTD))
        assert error(got, want) <= 1.3 * error(plain, want)
    jax.clear_caches()


@pytest.mark.parametrize("taps", [10, 15])
def test_a_variance_is_the_same_from_sums_over_windows(taps):
    keys = jax.random.split(jax.random.key(0), 2)
    windows_TK = 0.5 + jax.random.normal(keys[0], (convolutions.STRETCH + 77, taps))
    kernel_KC = jax.random.normal(keys[1], (taps, 8)) * jnp.geomspace(1e-2, 1e2, 8)
    weights_T1 = jnp.where(jnp.arange(len(windows_TK)) < 2_000, 1 / 2_000, 0)[:, None]

    def statistics(how):
        def total(kernel_KC):
            mean_K, variance_C = how(windows_TK, weights_T1, kernel_KC)
            return jnp.sum(jnp.log(variance_C)), (mean_K, variance_C)

        grad_KC, both = jax.grad(total, has_aux=True)(kernel_KC)
        return *both, grad_KC

    by_channel = functools.partial(convolutions._by_channel, dtype=jnp.float32)
    for got, want in zip(
        statistics(convolutions._by_products), statistics(by_channel), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_a_position_convolution_by_places_is_the_one_by_pieces(monkeypatch):
    position = positions.PositionConv(tiny.BASE, key=jax.random.key(0))
    x_BTD = jax.random.normal(jax.random.key(1), (2, 77, tiny.BASE.width))
    grad_BTD = jnp.sin(jnp.arange(x_BTD.size).reshape(x_BTD.shape))

    def with_gradients():
        y_BTD, pull = jax.vjp(position._convolve, x_BTD, position.weight())
        return y_BTD, *pull(grad_BTD)

    want = with_gradients()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    for a, b in zip(with_gradients(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * jnp.abs(b).max())


@pytest.mark.parametrize("rate", [0.1, 0.3, 1e-9, 2**-16, 0.5])
def test_what_is_kept_has_a_hash_of_at_least_the_rate(rate):
    """Compared before the hash's last step, but the same; also where the upper halves agree."""
    golden, least = 0x9E3779B9, round(rate * 2**32)
    keys = jax.random.split(jax.random.key(0), 2)
    row_bits = jax.random.bits(keys[0], (1000, 1))
    column = jnp.arange(1000, dtype=jnp.uint32)[None, :]
    hashed = layers._hash(row_bits + column * jnp.uint32(golden))
    kept = layers.is_kept(row_bits, column, rate)
    np.testing.assert_array_equal(kept, hashed >= jnp.uint32(least))
    near = (hashed >> 16) == (least >> 16)
    assert near.any()


def test_xla_knows_the_options_that_a_step_is_compiled_with_on_gpus(hopper):
    """They are XLA's, whatever it compiles for; of others it knows nothing."""
    model = tiny.model()
    optimizer = optim.adamw(OPTIM, num_steps=10)
    loss = functools.partial(pretraining.loss, config=LOSS, num_steps=10)
    step = train.make_step(loss, optimizer, accumulate=1)
    state = train.init_state(model, optimizer)
    assert int(step(state, batch(), jax.random.key(0))[0].step) == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_triton_gems"):
        jax.jit(jnp.sin, compiler_options={"xla_gpu_enable_triton_gems": False})(1.0)
