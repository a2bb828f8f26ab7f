# SPDX-License-Identifier: Apache-2.0
"""Purities and PNMI: known cases, scikit-learn's numbers, and which frame has which phone."""

import numpy as np
import pytest
from sklearn import metrics

from hubert_jax.ops import scores


def counts_of(phones, codes) -> np.ndarray:
    return scores.joint_counts(np.asarray(phones), np.asarray(codes), num_phones=10, num_codes=12)


def test_codes_that_name_the_phones_score_one():
    phones_T = np.random.default_rng(0).integers(0, 10, 500)
    found = scores.score(counts_of(phones_T, 11 - phones_T))
    np.testing.assert_allclose(found[:3], 1, atol=1e-12)
    assert found.num_frames == 500 and found.num_phones == 10


def test_codes_that_know_nothing_score_the_commonest():
    phones_T, codes_T = np.repeat([0, 1], [75, 25]).repeat(4), np.tile([0, 1, 2, 3], 100)
    found = scores.score(counts_of(phones_T, codes_T))
    np.testing.assert_allclose(found[:3], (0, 0.75, 0.25), atol=1e-12)


def test_more_codes_than_phones_lower_cluster_purity_only():
    phones_T = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = scores.score(counts_of(phones_T, [0, 0, 1, 1, 2, 2, 3, 3]))
    np.testing.assert_allclose(found[:3], (1, 1, 0.5), atol=1e-12)


def test_scores_of_a_small_table_by_hand():
    found = scores.score(np.array([[3, 1, 0], [0, 1, 3]]))
    # I = log 2 - 2/8 log 2 (only the middle code leaves a phone open), H = log 2
    np.testing.assert_allclose(found[:3], (0.75, 7 / 8, 6 / 8), atol=1e-12)


def test_numbers_are_scikit_learns():
    rng = np.random.default_rng(1)
    phones_T = rng.integers(0, 10, 2_000)
    codes_T = np.where(rng.random(2_000) < 0.4, phones_T, rng.integers(0, 12, 2_000))
    found = scores.score(counts_of(phones_T, codes_T))
    table = metrics.cluster.contingency_matrix(phones_T, codes_T)
    assert found.pnmi == pytest.approx(metrics.homogeneity_score(phones_T, codes_T), abs=1e-9)
    assert found.phone_purity == pytest.approx(table.max(axis=0).sum() / 2_000)
    assert found.cluster_purity == pytest.approx(table.max(axis=1).sum() / 2_000)
    assert 0.05 < found.pnmi < 0.95


def test_counts_add_up_over_utterances_and_leave_unknown_phones_out():
    rng = np.random.default_rng(2)
    phones_T, codes_T = rng.integers(-1, 10, 300), rng.integers(0, 12, 300).astype(np.int16)
    whole = counts_of(phones_T, codes_T)
    parts = counts_of(phones_T[:100], codes_T[:100]) + counts_of(phones_T[100:], codes_T[100:])
    np.testing.assert_array_equal(whole, parts)
    assert whole.sum() == (phones_T >= 0).sum() < 300


@pytest.mark.parametrize("hop", [160, 320])
def test_a_frame_has_the_phone_at_its_centre(hop):
    num_frames, phone_ids = 12, np.array([4, 7, 4])
    starts, stops = np.array([200, 840, 1_501]), np.array([840, 1_000, 1_800])
    at_sample = np.full(400 + hop * num_frames, scores.NO_PHONE)
    for start, stop, phone in zip(starts, stops, phone_ids, strict=True):
        at_sample[start:stop] = phone
    got_T = scores.frame_phones(
        num_frames, hop=hop, starts_I=starts, stops_I=stops, phones_I=phone_ids
    )
    assert got_T.tolist() == [at_sample[t * hop + 200] for t in range(num_frames)]
    assert {4, 7, scores.NO_PHONE} == set(got_T.tolist())
    nothing = np.zeros(0, np.int64)
    unknown_T = scores.frame_phones(3, hop=hop, starts_I=nothing, stops_I=nothing, phones_I=nothing)
    assert unknown_T.tolist() == [scores.NO_PHONE] * 3


def test_perplexity_counts_equally_used_codes():
    assert scores.perplexity(np.array([5, 0, 5, 5, 5])) == pytest.approx(4)
    assert scores.perplexity(np.array([9, 0])) == pytest.approx(1)
