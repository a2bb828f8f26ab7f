# SPDX-License-Identifier: Apache-2.0
"""What is minimised: masked prediction of codes, and a penalty on the extractor's output.

All of it in float32, whatever the model computes in. Source: fairseq's hubert_criterion and
HubertModel.compute_nce; the K + 1 way contrast there equals the plain softmax here.

B batch, T frames, D width, C codes, E code width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def code_logits(query_BTE, codes_CE, *, temperature: float) -> jax.Array:
    """Cosine similarity of every frame with every code, divided by the temperature."""
    query_BTE = _unit_length(query_BTE.astype(jnp.float32))
    codes_CE = _unit_length(codes_CE.astype(jnp.float32))
    exact = jax.lax.Precision.HIGHEST  # float32 products on TPUs and GPUs too
    return jnp.einsum("bte,ce->btc", query_BTE, codes_CE, precision=exact) / temperature


def _unit_length(x):
    """x / |x| along the last axis; torch.cosine_similarity's floor of 1e-8 on the norm."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-16))


class Prediction(NamedTuple):
    """Sums over frames of one set of labels, split by whether the frame was masked.

    Natural logarithms; `*_correct` count frames whose most likely code is the label.
    """

    masked_loss: jax.Array
    masked_correct: jax.Array
    masked_frames: jax.Array
    unmasked_loss: jax.Array
    unmasked_correct: jax.Array
    unmasked_frames: jax.Array
    predicted_perplexity: jax.Array  # of the histogram of most likely codes on masked frames
    label_perplexity: jax.Array


def prediction(logits_BTC, labels_BT, mask_BT, weights_B) -> Prediction:
    """Cross-entropy and accuracy of one set of labels on masked and unmasked frames.

    `weights_B` is 1 for a row and 0 for one that only fills a batch up.
    """
    num_codes = logits_BTC.shape[-1]
    is_label_BTC = labels_BT[..., None] == jnp.arange(num_codes)  # cheaper than a gather's gradient
    label_logit_BT = jnp.sum(jnp.where(is_label_BTC, logits_BTC, 0.0), axis=-1)
    loss_BT = jax.nn.logsumexp(logits_BTC, axis=-1) - label_logit_BT
    predicted_BT = jnp.argmax(logits_BTC, axis=-1)
    correct_BT = (predicted_BT == labels_BT).astype(jnp.float32)
    masked_BT = mask_BT * weights_B[:, None]
    unmasked_BT = ~mask_BT * weights_B[:, None]
    return Prediction(
        masked_loss=jnp.sum(loss_BT * masked_BT),
        masked_correct=jnp.sum(correct_BT * masked_BT),
        masked_frames=jnp.sum(masked_BT),
        unmasked_loss=jnp.sum(loss_BT * unmasked_BT),
        unmasked_correct=jnp.sum(correct_BT * unmasked_BT),
        unmasked_frames=jnp.sum(unmasked_BT),
        predicted_perplexity=_perplexity(predicted_BT, masked_BT, num_codes),
        label_perplexity=_perplexity(labels_BT, masked_BT, num_codes),
    )


def _perplexity(codes_BT, weights_BT, num_codes: int):
    counts_C = jnp.zeros(num_codes).at[codes_BT].add(weights_BT)
    share_C = counts_C / jnp.maximum(jnp.sum(counts_C), 1.0)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share_C)))


def feature_penalty(features_BTC) -> jax.Array:
    """Mean of squares of the extractor's output, in float32."""
    return jnp.mean(jnp.square(features_BTC.astype(jnp.float32)))


def spread(features_BTD, counts_BT) -> jax.Array:
    """How far features are from their mean over the frames that count, as a share of their size.

    0 where all are the same, at most 1.
    """
    x_BTD = features_BTD.astype(jnp.float32)
    weights_BT1 = (counts_BT / jnp.maximum(jnp.sum(counts_BT), 1))[..., None]
    mean_D = jnp.sum(weights_BT1 * x_BTD, axis=(0, 1))
    variance = jnp.sum(weights_BT1 * jnp.square(x_BTD - mean_D))
    size = jnp.sum(weights_BT1 * jnp.square(x_BTD))
    return jnp.sqrt(variance / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
