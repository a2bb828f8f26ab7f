# SPDX-License-Identifier: Apache-2.0
"""The batch plan: pure, complete, exact on resume."""

import copy
import itertools

import numpy as np
import pytest

from hubert_jax.data import batches, rungs
from hubert_jax.ops import frames
from tests.data.fake_split import (
    CONFIG,
    NUM_UTTERANCES,
    assert_same,
    epoch_of,
    lengths,
    make_plan,
    replace,
)


@pytest.mark.parametrize("num_utterances", [1, 3, 11, 53, 400])
def test_every_epoch_holds_every_utterance(num_utterances):
    num_samples = lengths(num_utterances) + 800
    plan = make_plan(num_samples)
    for epoch in (0, 1, 7):
        taken = np.concatenate([batch.utterances_B for batch in epoch_of(plan, epoch)])
        assert set(taken) == set(range(num_utterances))
        # Repeats only top the last batch up.
        assert len(taken) - num_utterances < plan.rows(plan.rungs[0])


def test_short_utterances_are_dropped_and_counted():
    num_samples = lengths()
    plan = make_plan(num_samples)
    taken = {n for batch in epoch_of(plan) for n in batch.utterances_B}
    assert taken == set(np.flatnonzero(num_samples >= 1600))
    assert plan.num_dropped == NUM_UTTERANCES - len(taken) > 0


def test_repeats_are_not_in_the_batch_they_top_up():
    plan = make_plan(lengths(400) + 800)
    assert plan._layout.num_repeats > 0
    for epoch in range(3):
        for batch in epoch_of(plan, epoch):
            assert len(set(batch.utterances_B)) == len(batch.utterances_B)


def test_crops_fit_and_start_on_the_hop_grid_anywhere():
    num_samples = np.full(40, frames.num_samples(20))
    plan = make_plan(num_samples, replace(rungs=(frames.num_samples(11) / 16_000,)))
    starts = np.concatenate(
        [batch.first_frames_B for epoch in range(20) for batch in epoch_of(plan, epoch)]
    )
    assert set(starts) == set(range(10))  # 20 frames, 11 of them taken
    for batch in epoch_of(make_plan()):
        stops = batch.first_frames_B * frames.HOP + batch.num_samples
        assert (stops <= lengths()[batch.utterances_B]).all()
        assert (batch.first_frames_B >= 0).all()


def test_rows_carry_the_same_audio_in_multiples():
    plan = make_plan(lengths(400), replace(seconds=8.0, row_multiple=3), row_multiple=2)
    assert len(plan.rungs) > 1
    for rung in plan.rungs:
        rows = plan.rows(rung)
        assert rows % 6 == 0
        assert rows * rung <= 8.0 * 16_000 < (rows + 6) * rung
    assert {len(b.utterances_B) == plan.rows(b.num_samples) for b in epoch_of(plan)} == {True}
    assert {batch.num_samples for batch in epoch_of(plan)} == set(plan.rungs)


def test_rungs_are_whole_numbers_of_frames():
    literal = make_plan(config=replace(rungs=(0.3, 0.9)))
    assert literal.rungs == (frames.num_samples(14), frames.num_samples(44))
    for rung in literal.rungs + make_plan().rungs:
        assert frames.num_samples(frames.num_frames(rung)) == rung
    # The paper's longest crop is exactly on the grid.
    whole = make_plan(np.full(8, 500_000), replace(seconds=40.0, max_seconds=15.625))
    assert whole.rungs == (250_000,)


def test_plan_is_a_function_of_the_step():
    plan, other = make_plan(), make_plan()
    steps = [40, 3, 0, 41, 3, 1000, 7, 40]
    backwards = {step: other[step] for step in sorted(steps, reverse=True)}
    for step in steps:
        assert_same(plan[step], backwards[step])
    assert_same(copy.copy(plan)[40], plan[40])


def test_epochs_and_seeds_differ():
    plan, other = make_plan(), make_plan(seed=1)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)

    def order(epoch):
        return [tuple(batch.utterances_B) for batch in epoch]

    def starts(epoch):
        pairs = [zip(batch.utterances_B, batch.first_frames_B, strict=True) for batch in epoch]
        return dict(itertools.chain(*pairs))

    for a, b in itertools.combinations([first, second, epoch_of(other, 0)], 2):
        assert order(a) != order(b)
        assert starts(a) != starts(b)
    assert len(first) == len(second) == plan.batches_per_epoch
    # Batches of all rungs are mixed.
    in_order = [batch.num_samples for batch in first]
    assert in_order not in (sorted(in_order), sorted(in_order, reverse=True))


def test_share_left_out_is_what_an_epoch_leaves_out():
    num_samples = lengths(200)
    for config in (CONFIG, replace(num_rungs=1), replace(rungs=(0.2, 0.5))):
        plan = make_plan(num_samples, config)
        for epoch in (0, 3):
            seen = np.zeros(200, int)
            for batch in epoch_of(plan, epoch):
                for utterance in batch.utterances_B:
                    seen[utterance] = max(seen[utterance], batch.num_samples)
            assert plan.share_left_out == pytest.approx(1 - seen.sum() / num_samples.sum())
    assert make_plan(num_samples).share_left_out < 0.35 < plan.share_left_out


def cropped(ladder, lengths_N):
    return sum(n - max(rung for rung in ladder if rung <= n) for n in lengths_N)


def test_fitted_ladders_are_the_best():
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths_N = generator.integers(5, 16, generator.integers(1, 12))
        different = np.unique(lengths_N)
        ladders = rungs.fit_ladders(lengths_N, 4)
        assert len(ladders) == min(4, len(different))
        for num_rungs, ladder in enumerate(ladders, start=1):
            every = itertools.combinations(range(5, 16), num_rungs)
            best = min(cropped(r, lengths_N) for r in every if r[0] <= different[0])
            assert len(ladder) == num_rungs
            assert cropped(ladder, lengths_N) == best


def test_small_corpora_get_few_rungs():
    """Twenty utterances of twenty lengths fill no batch of many rungs: leftovers are cropped."""
    num_samples = frames.num_samples(1) + 320 * np.arange(20, 40)
    config = replace(num_rungs=8, seconds=4.0)
    plan = make_plan(num_samples, config)
    assert len(plan.rungs) < 8
    fitted = rungs.fit_ladders(frames.num_frames(num_samples), 8)[-1]
    many = make_plan(num_samples, replace(seconds=4.0, rungs=tuple(fitted * 0.02 + 0.005)))
    assert len(rungs.fit_ladders(frames.num_frames(num_samples), 8)[-1]) == 8
    assert plan.share_left_out < many.share_left_out


def test_validation_holds_every_utterance_once():
    num_samples = lengths()
    plan = batches.validation_batches(num_samples, CONFIG, row_multiple=4)
    again = batches.validation_batches(num_samples, CONFIG, row_multiple=4)
    taken = []
    for batch, same in zip(plan, again, strict=True):
        assert_same(batch, same)
        assert (batch.first_frames_B == 0).all()
        assert len(batch.utterances_B) % 4 == 0
        assert (batch.num_samples <= num_samples[batch.utterances_B]).all()
        taken += list(batch.utterances_B[batch.weights_B == 1])
    assert sorted(taken) == list(np.flatnonzero(num_samples >= 1600))
    assert (plan[-1].weights_B == 0).any()
    (one,) = batches.validation_batches(np.array([9000]), CONFIG, row_multiple=4)
    assert one.weights_B.sum() == 1


def test_plan_refuses_with_numbers():
    with pytest.raises(ValueError, match=r"batch.seconds 4 is too small.*8 x 0.985 s are 7.88 s"):
        make_plan(lengths(), replace(), row_multiple=8)
    with pytest.raises(ValueError, match=r"none of 3 utterances has 0.1 s, the longest has 0.09"):
        make_plan(np.array([1000, 1500, 20]))
    with pytest.raises(ValueError, match="have to rise"):
        make_plan(config=replace(rungs=(0.5, 0.3)))
    with pytest.raises(ValueError, match=r"have to be at least 0.025"):
        make_plan(config=replace(min_seconds=0.01))
