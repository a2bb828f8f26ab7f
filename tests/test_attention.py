# SPDX-License-Identifier: Apache-2.0
"""Which attention a platform gets, and that all of them are the same attention."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import attention, sharding
from hubert_jax.layers import dropout
from tests import tiny

NUM_FRAMES = 49  # odd, which cuDNN does not take
LENGTHS = np.array([49, 31, 1])


def heads():
    """Query, key and value of three rows, (3, 4, T, 16) each."""
    shape = (len(LENGTHS), 4, NUM_FRAMES, 16)
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]


def valid():
    return np.arange(NUM_FRAMES) < LENGTHS[:, None]


def assert_same(one, other):
    """Values, and gradients for query, key and value."""

    def value_and_gradients(attend):
        def total(qkv):
            mixed_BHTK = attend(*qkv)
            return jnp.sum(jnp.sin(mixed_BHTK)), mixed_BHTK

        return jax.jit(jax.value_and_grad(total, has_aux=True))(heads())

    (_, got_BHTK), got = value_and_gradients(one)
    (_, want_BHTK), want = value_and_gradients(other)
    for a, b in zip([got_BHTK, *got], [want_BHTK, *want], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("valid_BT", [None, valid()], ids=["whole", "padded"])
def test_what_cudnn_is_asked_for_is_the_plain_attention(valid_BT):
    """JAX's own XLA form stands in for cuDNN's: layouts, scale, lengths and gradients."""
    other = functools.partial(attention.by_cudnn, valid_BT=valid_BT, by="xla")
    assert_same(other, functools.partial(attention.plain, valid_BT=valid_BT))


def device(capability: str):
    return [types.SimpleNamespace(compute_capability=capability)]


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "has_dropout", "want"),
    [
        ("gpu", "9.0", "bfloat16", False, "kernels"),
        ("gpu", "8.0", "bfloat16", False, "cudnn"),
        ("gpu", "10.3", "bfloat16", False, "cudnn"),
        ("gpu", "9.0", "bfloat16", True, "kernels"),
        ("gpu", "8.0", "bfloat16", True, "kernels"),
        ("gpu", "9.0", "float32", True, "plain"),
        ("gpu", "7.5", "bfloat16", True, "plain"),
        ("gpu", "9.0", "float32", False, "plain"),
        ("gpu", "7.5", "bfloat16", False, "plain"),
        ("gpu", "gfx942", "bfloat16", False, "plain"),
        ("tpu", "", "bfloat16", False, "plain"),
        ("cpu", "", "bfloat16", False, "plain"),
    ],
)
def test_what_a_platform_gets(backend, capability, dtype, has_dropout, want, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: device(capability))

    def by(head_width: int) -> str:
        return attention.implementation(jnp.dtype(dtype), head_width, has_dropout=has_dropout)

    assert by(64) == want
    assert by(12) == by(136) == "plain"
    assert by(80) == ("plain" if want == "plain" or has_dropout else "cudnn")


@pytest.mark.parametrize(
    ("rate", "key", "has_dropout"),
    [(0.1, jax.random.key(0), True), (0.0, jax.random.key(0), False), (0.1, None, False)],
)
def test_a_layer_says_whether_it_drops_weights(rate, key, has_dropout, monkeypatch):
    asked = {}
    monkeypatch.setattr(attention, "implementation", lambda *_, **how: asked.update(how) or "plain")
    layer = attention.Attention(32, 4, dropout=rate, key=jax.random.key(1))
    layer(jnp.ones((1, 5, 32)), key=key)
    assert asked == {"has_dropout": has_dropout}


@pytest.mark.parametrize("sizes", [(2, 1, 4), (4, 2, 1), (1, 1, 8)])
def test_on_a_mesh_the_kernels_drop_the_same_weights(sizes):
    """Rows and heads split over eight devices, where they can be; interpreted."""
    qkv_BTCHK = jax.random.normal(jax.random.key(0), (8, 20, 3, 4, 16))
    valid_BT = np.arange(20) < np.arange(5, 21, 2)[:, None]
    by_kernels = functools.partial(
        attention.by_kernels, rate=0.3, key=jax.random.key(1), interpret=True
    )

    def plain(qkv_BTCHK, valid_BT):
        drop = functools.partial(dropout, rate=0.3, key=jax.random.key(1))
        qkv = qkv_BTCHK.transpose(2, 0, 3, 1, 4)
        return attention.plain(*qkv, valid_BT, drop=drop).swapaxes(1, 2)

    def gradients(attend):
        def total(qkv_BTCHK):
            mixed_BTHK = attend(qkv_BTCHK, valid_BT)
            return jnp.sum(jnp.sin(mixed_BTHK)), mixed_BTHK

        return jax.jit(jax.grad(total, has_aux=True))(qkv_BTCHK)

    want = gradients(plain)
    with jax.set_mesh(sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes, strict=True)))):
        got = gradients(by_kernels)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


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
    monkeypatch.setattr(attention, "implementation", lambda *_, **__: "cudnn")
    text = program()
    calls = set(re.findall(r"__cudnn\$\w+", text))
    assert calls == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    even = NUM_FRAMES + 1
    assert not any(f"{n}x{n}x" in text for n in (NUM_FRAMES, even)) and weights not in text
