# SPDX-License-Identifier: Apache-2.0
"""Span masks: which frames the model has to predict without seeing them.

Source: fairseq's compute_mask_indices (mask_selection static, no_overlap false, min_masks 2) as
HuBERT calls it. One deliberate difference: the reference thins every row to the smallest count of
the batch; rows here have equal lengths and keep their own count.

B batch, T frames, N possible starts
"""

import jax
import jax.numpy as jnp

MIN_SPANS = 2


def span_mask(key, batch: int, num_frames: int, *, prob: float, length: int) -> jax.Array:
    """A boolean mask_BT of random spans, True where the frame is hidden.

    Each row draws n = floor(prob * T / length + u), u ~ U(0, 1), at least two, span starts without
    replacement from [0, T - length); spans may overlap. About 56.7 % of the frames end up hidden
    at prob 0.8 and length 10. Where T - length <= n the spans shrink to T - n - 1 frames.

    Raises ValueError when the row is too short to leave a frame visible.
    """
    expected = prob * num_frames / length
    most_spans = max(MIN_SPANS, int(expected + 1))  # u < 1, so the floor never exceeds this
    if num_frames - length <= most_spans:
        length = num_frames - most_spans - 1
    if length < 1:
        raise ValueError(
            f"{num_frames} frames are too few for {most_spans} masked spans: everything would be"
            f" hidden; raise batch.min_seconds or lower model.mask_prob (now {prob})"
        )
    count_key, start_key = jax.random.split(key)
    u_B = jax.random.uniform(count_key, (batch,))
    spans_B = jnp.maximum(jnp.floor(expected + u_B).astype(jnp.int32), MIN_SPANS)

    num_starts = num_frames - length
    scores_BN = jax.random.uniform(start_key, (batch, num_starts))
    rank_BN = jnp.argsort(jnp.argsort(scores_BN, axis=1), axis=1)
    starts_BN = (rank_BN < spans_B[:, None]).astype(jnp.int32)

    opened_BT = jnp.cumsum(jnp.pad(starts_BN, ((0, 0), (0, length))), axis=1)
    closed_BT = jnp.pad(opened_BT, ((0, 0), (length, 0)))[:, :num_frames]
    return opened_BT > closed_BT
