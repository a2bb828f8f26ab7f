# SPDX-License-Identifier: Apache-2.0
"""Which attention a platform gets, and that all of them are the same attention."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import attention
from hubert_jax.layers import drop, dropout, row_bits
from tests import tiny

NUM_FRAMES = 50
LENGTHS = np.array([50, 31, 1])


def heads(num_frames: int = NUM_FRAMES):
    """Query, key and value of three rows, (3, 4, T, 16) each."""
    shape = (len(LENGTHS), 4, num_frames, 16)
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]


def valid():
    return np.arange(NUM_FRAMES) < LENGTHS[:, None]


def assert_same(one, other, *, num_frames: int = NUM_FRAMES):
    """Values, and gradients for query, key and value."""

    def value_and_gradients(attend):
        def total(qkv):
            mixed_BHTK = attend(*qkv)
            return jnp.sum(jnp.sin(mixed_BHTK)), mixed_BHTK

        return jax.jit(jax.value_and_grad(total, has_aux=True))(heads(num_frames))

    (_, got_BHTK), got = value_and_gradients(one)
    (_, want_BHTK), want = value_and_gradients(other)
    for a, b in zip([got_BHTK, *got], [want_BHTK, *want], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("valid_BT", [None, valid()], ids=["whole", "padded"])
def test_what_flash_is_asked_for_is_the_plain_attention(valid_BT):
    """JAX's own XLA form stands in for cuDNN's: layouts, scale, lengths and gradients."""
    flash = functools.partial(attention.flash, valid_BT=valid_BT, by="xla")
    assert_same(flash, functools.partial(attention.plain, valid_BT=valid_BT))


@pytest.mark.parametrize("num_frames", [1, 50, 128, 129, 300])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_blocks_of_queries_are_the_plain_attention_with_the_same_weights_dropped(num_frames, rate):
    shape = (len(LENGTHS), 4, num_frames, num_frames)
    bits_BHT1 = row_bits(jax.random.key(1), shape) if rate else None
    options = {"rate": rate, "bits_BHT1": bits_BHT1}
    blocks, plain = (functools.partial(f, **options) for f in (attention.blocks, attention.plain))
    assert_same(blocks, plain, num_frames=num_frames)
    if rate:
        np.testing.assert_array_equal(
            drop(jnp.ones(shape), rate, bits_BHT1),
            dropout(jnp.ones(shape), rate, jax.random.key(1)),
        )


def test_blocks_take_padded_rows():
    blocks, plain = (
        functools.partial(f, valid_BT=valid()) for f in (attention.blocks, attention.plain)
    )
    assert_same(blocks, plain)


def test_training_on_a_cpu_keeps_no_weights_of_all_pairs_of_frames():
    layer = jax.tree.map(lambda array_L: array_L[0], tiny.model().encoder.layers.attention)
    x_BTD = jnp.ones((2, 300, tiny.BASE.width))
    for key, is_there in ((None, True), (jax.random.key(0), False)):
        gradient = jax.grad(lambda x_BTD, key=key: jnp.sum(layer(x_BTD, key=key)))
        assert is_there == ("300,300]" in str(jax.make_jaxpr(gradient)(x_BTD)))


def device(capability: str):
    return [types.SimpleNamespace(compute_capability=capability)]


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "trains", "has_dropout", "want"),
    [
        ("gpu", "9.0", "bfloat16", False, False, "flash"),
        ("gpu", "8.0", "bfloat16", True, False, "flash"),
        ("gpu", "10.3", "bfloat16", True, False, "flash"),
        ("gpu", "9.0", "bfloat16", True, True, "plain"),
        ("gpu", "9.0", "float32", True, False, "plain"),
        ("gpu", "7.5", "bfloat16", False, False, "plain"),
        ("gpu", "gfx942", "bfloat16", False, False, "plain"),
        ("tpu", "", "bfloat16", True, True, "plain"),
        ("cpu", "", "bfloat16", True, True, "plain"),
        ("cpu", "", "float32", False, False, "plain"),
        ("cpu", "", "float32", True, False, "blocks"),
        ("cpu", "", "float32", True, True, "blocks"),
    ],
)
def test_each_platform_has_its_form(
    backend, capability, dtype, trains, has_dropout, want, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: device(capability))
    options = {"trains": trains, "has_dropout": has_dropout}
    assert attention.implementation(jnp.dtype(dtype), 64, **options) == want
    if want == "flash":
        assert attention.implementation(jnp.dtype(dtype), 12, **options) == "plain"
        assert attention.implementation(jnp.dtype(dtype), 136, **options) == "plain"


@pytest.mark.parametrize(
    ("rate", "key", "want"),
    [
        (0.1, jax.random.key(0), {"trains": True, "has_dropout": True}),
        (0.0, jax.random.key(0), {"trains": True, "has_dropout": False}),
        (0.1, None, {"trains": False, "has_dropout": False}),
    ],
)
def test_a_layer_says_what_it_is_about_to_do(rate, key, want, monkeypatch):
    asked = {}
    monkeypatch.setattr(attention, "implementation", lambda *_, **how: asked.update(how) or "plain")
    layer = attention.Attention(32, 4, dropout=rate, key=jax.random.key(1))
    layer(jnp.ones((1, 5, 32)), key=key)
    assert asked == want


@pytest.mark.parametrize("valid_BT", [None, valid()], ids=["whole", "padded"])
def test_on_a_gpu_a_layer_becomes_one_call_of_cudnn_each_way(valid_BT, monkeypatch):
    """Lowered for CUDA here, where it cannot run; nothing of T x T is left in the program."""
    cudnn = types.SimpleNamespace(cudnn_get_version=lambda: 91_000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", cudnn)
    block = tiny.model().encoder.layers
    layer = jax.tree.map(lambda array_L: array_L[0], block.attention)
    x_BTD = jnp.ones((len(LENGTHS), NUM_FRAMES, tiny.BASE.width), jnp.bfloat16)

    def program() -> str:
        def total(layer, x_BTD):
            return jnp.sum(layer(x_BTD, valid_BT).astype(jnp.float32))

        traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(layer, x_BTD)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    num_keys = NUM_FRAMES if valid_BT is None else 64  # in whole blocks
    weights = f"{NUM_FRAMES}x{num_keys}x"
    assert weights in program() and "cudnn" not in program()
    monkeypatch.setattr(attention, "implementation", lambda *_, **__: "flash")
    text = program()
    calls = set(re.findall(r"__cudnn\$\w+", text))
    assert calls == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert weights not in text and f"{NUM_FRAMES}x{NUM_FRAMES}x" not in text
