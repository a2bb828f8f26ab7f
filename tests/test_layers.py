# SPDX-License-Identifier: Apache-2.0
"""Parts of the model that are computed in another way than the plain one.

B batch, T frames, C channels, D channels of an output, K taps
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import layers

# --- dropout


def dropped(shape, *, seed, rate=0.1) -> np.ndarray:
    x = layers.dropout(jnp.ones(shape), rate, jax.random.key(seed))
    np.testing.assert_allclose(np.unique(x), [0, 1 / (1 - rate)], rtol=1e-6)
    return np.asarray(x == 0, np.float64)


def test_dropout_drops_its_share_everywhere():
    num = np.array([40, 60, 250])
    drops = dropped(num, seed=0)
    for axis in range(3):  # rows, columns and layers of the array alike
        others = tuple(a for a in range(3) if a != axis)
        deviation = np.sqrt(0.1 * 0.9 / (num.prod() / num[axis]))
        shares = drops.mean(axis=others)
        assert abs(shares - 0.1).max() < 5 * deviation
        assert 0.7 * deviation < shares.std() < 1.3 * deviation


def test_what_dropout_does_to_one_element_says_nothing_of_another():
    """Neighbours in each direction, neighbouring seeds, and rows of the same number."""
    shape = (40, 60, 250)
    drops, others = dropped(shape, seed=0) - 0.1, dropped(shape, seed=1) - 0.1
    pairs = [(drops, others), (drops[:, :, 1:], others[:, :, :-1])]
    for axis in range(3):
        for step in (1, 2, 8, 16):
            later = np.split(drops, [step], axis)[1]
            pairs.append((later, np.split(drops, [-step], axis)[0]))
    for one, other in pairs:
        assert abs(np.mean(one * other)) < 5 * 0.09 / np.sqrt(one.size)


def test_dropout_of_one_array_does_not_depend_on_its_sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    x = jnp.ones((8, 4, 6))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a", None, "b")))
    drop = jax.jit(lambda x: layers.dropout(x, 0.5, jax.random.key(0)))
    np.testing.assert_array_equal(drop(sharded), drop(x))
    assert 0 < np.mean(drop(x) == 0) < 1


def test_dropout_without_a_key_or_a_rate_gives_its_argument_back():
    x = jnp.ones((2, 3))
    assert layers.dropout(x, 0.1, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(0)) is x


# --- products, whose gradients are written by hand


@pytest.mark.parametrize("shape", [(4,), (3, 2), (5, 3, 2)])
@pytest.mark.parametrize("leading", [(), (7,), (2, 7), (0, 7)])
def test_gradients_of_a_product_are_those_that_jax_derives(leading, shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*leading, 6))
    kernel = jax.random.normal(keys[1], (6, *shape))
    grad = jax.random.normal(keys[2], (*leading, *shape))

    def with_gradients(multiply):
        y, pull = jax.vjp(multiply, x, kernel)
        return y, *pull(grad)

    got, want = (with_gradients(f) for f in (layers.product, lambda x, k: jnp.tensordot(x, k, 1)))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_what_remat_keeps_of_matmuls_is_kept_of_products():
    """jax's policy sees, in a scan, the product behind the gradient written by hand."""
    x, kernels = jnp.ones((2, 7, 6)), jnp.ones((3, 6, 6))
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def num_products(multiply) -> int:
        def layer(x, kernel):
            return jnp.sin(multiply(x, kernel)), None

        def total(x):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=policy), x, kernels)[0])

        traced = jax.jit(jax.grad(total)).trace(x)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("dot_general")

    assert num_products(layers.product) == num_products(jnp.matmul) == 2


# --- in bfloat16: forms of their own, compared in float32


def test_the_gradient_of_a_layer_norm_that_keeps_only_x_is_the_one_that_jax_derives():
    keys = jax.random.split(jax.random.key(0), 3)
    x, grad = (3 + jax.random.normal(key, (5, 7, 24)) for key in keys[:2])
    scale, bias = jax.random.normal(keys[2], (2, 24))

    def with_gradients(norm):
        y, pull = jax.vjp(norm, x, scale, bias)
        return y, *pull(grad)

    got = with_gradients(layers.layer_norm_of_short)
    want = with_gradients(lambda *args: layers._layer_norm(*args)[0])
    assert (got[1] != want[1]).any()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * jnp.abs(b).max())


def test_phi_is_the_one_with_erf():
    x = jnp.linspace(-9, 9, 10_001)
    got = layers._phi(x, jnp.exp(-0.5 * x * x))
    want = [0.5 * (1 + math.erf(float(each) / math.sqrt(2))) for each in x]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-7)


def test_gelu_in_bfloat16_is_float32s_rounded():
    x = jnp.linspace(-9, 9, 10_001).astype(jnp.bfloat16)
    y, slope = jax.vmap(jax.value_and_grad(layers.gelu))(x)
    want, want_slope = jax.vmap(jax.value_and_grad(layers.gelu))(x.astype(jnp.float32))
    np.testing.assert_allclose(y, want, rtol=2**-8, atol=3e-6)
    np.testing.assert_allclose(slope, want_slope, rtol=2**-8, atol=3e-6)


@pytest.mark.parametrize("rate", [0.1, 0.3, 1e-9, 2**-16, 0.5])
def test_what_is_kept_has_a_hash_of_at_least_the_rate(rate):
    """Compared before the hash's last step, but the same; also where the upper halves agree."""
    golden, least = 0x9E3779B9, round(rate * 2**32)
    row_bits = jax.random.bits(jax.random.key(0), (1000, 1))
    column = jnp.arange(1000, dtype=jnp.uint32)[None, :]
    hashed = layers._hash(row_bits + column * jnp.uint32(golden))
    kept = layers.is_kept(row_bits, column, rate)
    np.testing.assert_array_equal(kept, hashed >= jnp.uint32(least))
    assert ((hashed >> 16) == (least >> 16)).any()
