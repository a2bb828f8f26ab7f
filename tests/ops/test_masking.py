# SPDX-License-Identifier: Apache-2.0
"""Span masks have the statistics of HUBERT.md and never hide everything."""

import jax
import numpy as np
import pytest

from hubert_jax.ops import masking


def draw(num_frames, rows, *, prob=0.8, length=10, seed=0):
    key = jax.random.key(seed)
    return np.asarray(masking.span_mask(key, rows, num_frames, prob=prob, length=length))


@pytest.mark.parametrize("num_frames, deviation", [(781, 0.025), (249, 0.044)])
def test_share_of_masked_frames(num_frames, deviation):
    share_B = draw(num_frames, 4000).mean(axis=1)
    assert share_B.mean() == pytest.approx(0.567, abs=0.004)
    assert share_B.std() == pytest.approx(deviation, abs=0.002)


def test_spans_are_whole_and_their_number_is_the_rule():
    mask_BT = draw(400, 500)
    n_low, n_high = 32, 32  # floor(0.8 * 400 / 10 + u) = 32 for every u < 1
    edges_BT = np.diff(np.pad(mask_BT, ((0, 0), (1, 1))).astype(int), axis=1)
    for edges_T, mask_T in zip(edges_BT, mask_BT, strict=True):
        runs = np.flatnonzero(edges_T == -1) - np.flatnonzero(edges_T == 1)
        assert runs.min() >= 10
        assert len(runs) <= n_high and mask_T.sum() <= 10 * n_high
        assert mask_T.sum() >= n_low + 9  # distinct starts


def test_the_number_of_spans_varies_where_the_rule_is_fractional():
    # 0.8 * 25 / 10 = 2.0 -> always 2; 0.8 * 31 / 10 = 2.48 -> 3 for 48 % of the rows. Spans of
    # one frame make the count visible.
    counts_B = draw(31, 4000, prob=0.08, length=1).sum(axis=1)
    assert set(counts_B) == {2, 3}
    assert (counts_B == 3).mean() == pytest.approx(0.48, abs=0.03)


@pytest.mark.parametrize("num_frames", [5, 8, 12, 14, 20, 99])
def test_short_rows_keep_a_visible_frame_and_at_least_two_spans(num_frames):
    mask_BT = draw(num_frames, 500)
    assert not mask_BT.all(axis=1).any()
    assert (mask_BT.sum(axis=1) >= 2).all()


def test_too_short_a_row_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="3 frames are too few for 2 masked spans"):
        draw(3, 1)


def test_masks_are_a_function_of_the_key():
    np.testing.assert_array_equal(draw(99, 8), draw(99, 8))
    assert (draw(99, 8) != draw(99, 8, seed=1)).any()
