# SPDX-License-Identifier: Apache-2.0
"""The loss is the reference's contrast written out, and its parts add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax.ops import losses

B, T, E, C = 2, 7, 5, 6


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    query_BTE = rng.normal(size=(B, T, E)).astype(np.float32)
    codes_CE = rng.normal(size=(C, E)).astype(np.float32)
    labels_BT = rng.integers(0, C, (B, T))
    mask_BT = rng.random((B, T)) < 0.5
    return query_BTE, codes_CE, labels_BT, mask_BT


def contrast(query_BTE, codes_CE, labels_BT, mask_BT, temperature):
    """The reference's K + 1 ways: the target first, then all codes with the target's at -inf."""
    total = 0.0
    for query_E, label in zip(query_BTE[mask_BT], labels_BT[mask_BT], strict=True):
        candidates = np.concatenate([codes_CE[label][None], codes_CE]).astype(np.float64)
        norms = np.linalg.norm(candidates, axis=1) * np.linalg.norm(query_E)
        logits = candidates @ query_E / norms / temperature
        logits[1 + label] = -np.inf
        total += np.log(np.exp(logits).sum()) - logits[0]
    return total


def test_masked_loss_is_the_reference_contrast():
    query_BTE, codes_CE, labels_BT, mask_BT = arrays()
    logits_BTC = losses.code_logits(query_BTE, codes_CE, temperature=0.1)
    got = losses.prediction(logits_BTC, labels_BT, mask_BT, np.ones(B))
    want = contrast(query_BTE, codes_CE, labels_BT, mask_BT, 0.1)
    assert float(got.masked_loss) == pytest.approx(want, rel=1e-5)
    want_unmasked = contrast(query_BTE, codes_CE, labels_BT, ~mask_BT, 0.1)
    assert float(got.unmasked_loss) == pytest.approx(want_unmasked, rel=1e-5)


def test_counts_and_perplexities():
    _, _, labels_BT, mask_BT = arrays()
    logits_BTC = 9.0 * jax.nn.one_hot(labels_BT, C)
    got = losses.prediction(logits_BTC, labels_BT, mask_BT, np.ones(B))
    assert got.masked_correct == got.masked_frames == mask_BT.sum()
    assert got.unmasked_correct == got.unmasked_frames == (~mask_BT).sum()
    share_C = np.bincount(labels_BT[mask_BT], minlength=C) / mask_BT.sum()
    perplexity = np.exp(-np.sum(share_C[share_C > 0] * np.log(share_C[share_C > 0])))
    assert float(got.label_perplexity) == pytest.approx(perplexity, rel=1e-5)
    assert float(got.predicted_perplexity) == pytest.approx(perplexity, rel=1e-5)


def test_rows_of_weight_zero_count_nowhere():
    query_BTE, codes_CE, labels_BT, mask_BT = arrays()
    logits_BTC = losses.code_logits(query_BTE, codes_CE, temperature=0.1)
    both = losses.prediction(logits_BTC, labels_BT, mask_BT, np.array([1.0, 0.0]))
    first = losses.prediction(logits_BTC[:1], labels_BT[:1], mask_BT[:1], np.ones(1))
    for got, want in zip(both, first, strict=True):
        assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_penalty_is_the_mean_of_squares_in_float32():
    x = jnp.full((2, 3, 4), 3.0, jnp.bfloat16)
    assert losses.feature_penalty(x) == 9.0 and losses.feature_penalty(x).dtype == jnp.float32


def test_a_zero_query_has_a_finite_gradient():
    _, codes_CE, _, _ = arrays()
    grad = jax.grad(lambda q: losses.code_logits(q, codes_CE, temperature=0.1).sum())
    assert np.isfinite(grad(jnp.zeros((B, T, E)))).all()
