# SPDX-License-Identifier: Apache-2.0
"""Padded batches: nobody is left out, shapes are few, and the lengths are the best there are."""

import itertools

import numpy as np

from hubert_jax.data import padding


def test_batches_hold_everybody_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1_000, 100_000, 500)
    rungs = padding.padded_lengths(np.repeat(lengths, 10))
    planned = padding.plan(lengths, rungs, lambda rung: 800_000 // rung)
    members = np.concatenate([batch.members for batch in planned])
    assert sorted(members.tolist()) == list(range(500))
    for batch in planned:
        assert lengths[batch.members].max() <= batch.num_samples in rungs
        assert len(batch.members) <= batch.num_rows == 800_000 // batch.num_samples
    assert all(len(batch.members) == batch.num_rows for batch in planned[:-1])
    assert len({(batch.num_rows, batch.num_samples) for batch in planned}) == len(rungs) > 2


def test_padded_lengths_are_the_best(monkeypatch):
    monkeypatch.setattr(padding, "RUNG_SECONDS", 2.0)
    lengths = np.random.default_rng(1).integers(1, 40, 12) * 640 - 100
    needed = sorted(set((-(-lengths // 320) * 320).tolist()))

    def cost(ladder):
        padded = np.array(ladder)[np.searchsorted(ladder, lengths)].sum()
        return padded / 16_000 + 2.0 * len(ladder)

    every = [
        (*ladder, needed[-1])
        for size in range(padding.MAX_RUNGS)
        for ladder in itertools.combinations(needed[:-1], size)
    ]
    best = padding.padded_lengths(lengths)
    assert 1 < len(best) < padding.MAX_RUNGS
    assert cost(best) == min(map(cost, every)) < max(map(cost, every))


def test_a_corpus_of_one_length_or_of_nothing_but_stubs_has_one_rung():
    assert padding.padded_lengths(np.full(50, 16_000)).tolist() == [16_000]
    assert padding.padded_lengths(np.array([0, 10, 399])).tolist() == [640]
