# SPDX-License-Identifier: Apache-2.0
"""The batch plan: pure, complete, exact on resume; audio and labels cropped together.

The audio of the fake corpus says which sample it is, its labels which label they are, so a crop
tells where it came from.
"""

import contextlib
import copy
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import cloudpickle
import numpy as np
import pytest

from hubert_jax.data import arrays, batches, rungs
from hubert_jax.ops import frames

CONFIG = batches.BatchConfig(
    seconds=4.0,
    min_seconds=0.1,
    max_seconds=1.0,
    num_rungs=3,
    rungs=(),
    row_multiple=1,
    num_workers=0,
    num_threads=2,
    read_ahead=4,
)
NUM_UTTERANCES = 53


def lengths(num_utterances=NUM_UTTERANCES, seed=0):
    """Samples, from 0.05 to 1.4 s: some are dropped, some are longer than the longest rung."""
    return np.random.default_rng(seed).integers(800, 22_400, num_utterances)


class FakeSplit:
    def __init__(self, num_samples):
        self.num_samples = num_samples
        self.ids = [f"utterance{n}" for n in range(len(num_samples))]

    def audio(self, position, start=0, stop=None):
        return np.arange(self.num_samples[position], dtype=np.float32)[start:stop]


def label_store(folder, split, *, rate, offset=0):
    """Label number t of every utterance is t + offset."""
    num_labels = frames.num_frames(split.num_samples, hop=frames.SAMPLE_RATE // rate)

    def produce(positions):
        for position in positions:
            yield position, (np.arange(num_labels[position]) + offset).astype(np.int16)

    arrays.write_store(
        folder,
        ids=split.ids,
        lengths=num_labels,
        width=None,
        dtype=np.int16,
        num_shards=2,
        produce=produce,
        card={"kind": "labels", "made_from": {}, "rate": rate},
    )
    return arrays.Store(folder)


def replace(**changes):
    return batches.dataclasses.replace(CONFIG, **changes)


def make_plan(num_samples=None, config=CONFIG, *, seed=0, row_multiple=2):
    num_samples = lengths() if num_samples is None else num_samples
    return batches.Plan(num_samples, config, seed=seed, row_multiple=row_multiple)


def epoch_of(plan, epoch=0):
    first = epoch * plan.batches_per_epoch
    return [plan[step] for step in range(first, first + plan.batches_per_epoch)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# The plan


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


# Loading


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    split = FakeSplit(lengths())
    folder = tmp_path_factory.mktemp("labels")
    stores = (
        label_store(folder / "mfcc", split, rate=100),
        label_store(folder / "layer", split, rate=50, offset=1000),
    )
    return split, stores


def test_audio_and_labels_are_cropped_together(corpus):
    split, stores = corpus
    plan = make_plan()
    cropped_inside = 0
    for batch in epoch_of(plan):
        loaded = batches.load(split, stores, batch, slice(None), normalize=False)
        audio_BS, labels_BTG = loaded["audio"], loaded["labels"]
        assert audio_BS.shape == (len(batch.utterances_B), batch.num_samples)
        assert labels_BTG.shape == (len(batch.utterances_B), batch.num_frames, 2)
        assert audio_BS.dtype == np.float32 and labels_BTG.dtype == np.int32
        # The first sample of every frame names the frame, and so do its labels.
        frames_BT = audio_BS[:, : batch.num_frames * frames.HOP : frames.HOP] / frames.HOP
        np.testing.assert_array_equal(labels_BTG[:, :, 0], 2 * frames_BT)
        np.testing.assert_array_equal(labels_BTG[:, :, 1], 1000 + frames_BT)
        cropped_inside += (frames_BT[:, 0] > 0).sum()
    assert cropped_inside > 10


def test_processes_load_their_rows(corpus):
    split, stores = corpus

    def read(parts, first_step=0):
        reader = batches.stream(
            split,
            stores,
            make_plan(config=replace(seconds=8.0), row_multiple=4),
            CONFIG,
            first_step=first_step,
            num_steps=12,
            normalize=False,
            parts=parts,
        )
        return dict(reader)

    whole, parts = read(((0,), 1)), [read(((i,), 4)) for i in range(4)]
    outer = read(((0, 3), 4))  # as where the network orders the devices
    assert list(whole) == list(range(12))
    for step, loaded in whole.items():
        for name, rows in loaded.items():
            np.testing.assert_array_equal(rows, np.concatenate([p[step][name] for p in parts]))
            first, *_, last = np.split(rows, 4)
            np.testing.assert_array_equal(outer[step][name], np.concatenate([first, last]))
    resumed = read(((0,), 1), first_step=9)
    assert list(resumed) == [9, 10, 11]
    for step, loaded in resumed.items():
        for name, rows in loaded.items():
            np.testing.assert_array_equal(rows, whole[step][name])
    with pytest.raises(ValueError, match="do not divide into 7 parts"):
        read(((0,), 7))


def test_worker_processes_load_the_same_and_end(corpus):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # FakeSplit, to the workers
    split, stores = corpus
    config = replace(num_workers=2)
    steps = {"first_step": 3, "num_steps": 10_000, "normalize": False}
    reader = batches.stream(split, stores, make_plan(), config, **steps)
    threads = batches.stream(split, stores, make_plan(), CONFIG, **steps)
    with contextlib.closing(reader), contextlib.closing(threads):
        for _ in range(5):
            (step, loaded), (same_step, same) = next(reader), next(threads)
            assert step == same_step
            for name, rows in loaded.items():
                np.testing.assert_array_equal(rows, same[name])


def test_worker_processes_outlive_the_signals_that_their_reader_gets(corpus):
    """A terminal and SLURM send them to all: the reader has a step to finish, and to save."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    split, stores = corpus
    config = replace(num_workers=2)
    steps = {"first_step": 0, "num_steps": 10_000, "normalize": False}
    with contextlib.closing(batches.stream(split, stores, make_plan(), config, **steps)) as reader:
        next(reader)
        loaders = multiprocessing.active_children()
        assert len(loaders) == 2
        for loader, number in itertools.product(loaders, (signal.SIGTERM, signal.SIGINT)):
            os.kill(loader.pid, number)
        assert [next(reader)[0] for _ in range(30)] == list(range(1, 31))
        assert all(loader.is_alive() for loader in loaders)
    assert not any(loader.is_alive() for loader in loaders)


def test_worker_processes_end_with_a_reader_that_is_killed(tmp_path):
    program = f"""
import multiprocessing, pathlib, time
from tests.data import test_batches as t
if __name__ == "__main__":
    split = t.FakeSplit(t.lengths())
    stores = [t.label_store(pathlib.Path({os.fspath(tmp_path)!r}) / "labels", split, rate=50)]
    steps = dict(first_step=0, num_steps=10_000, normalize=False)
    reader = t.batches.stream(split, stores, t.make_plan(), t.replace(num_workers=2), **steps)
    next(reader)
    print(*[loader.pid for loader in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""
    path = tmp_path / "program.py"
    path.write_text(program)
    environment = os.environ | {"PYTHONPATH": os.fspath(pathlib.Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, text=True, env=environment
    ) as reader:
        loaders = [int(number) for number in reader.stdout.readline().split()]
        reader.kill()
    assert len(loaders) == 2
    deadline = time.monotonic() + 30
    while any(pathlib.Path(f"/proc/{loader}").exists() for loader in loaders):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_normalized_before_cropping(corpus):
    split, stores = corpus
    batch = make_plan()[0]
    loaded = batches.load(split, stores, batch, slice(0, 2), normalize=True)
    for row in range(2):
        whole = split.audio(batch.utterances_B[row])
        whole = (whole - whole.mean()) / np.sqrt(whole.var() + 1e-5)
        start = batch.first_frames_B[row] * frames.HOP
        np.testing.assert_allclose(
            loaded["audio"][row], whole[start : start + batch.num_samples], atol=1e-5
        )


def test_loading_refuses_what_does_not_fit(corpus, tmp_path):
    split, stores = corpus
    plan = make_plan()

    def read(split, stores):
        steps = {"first_step": 0, "num_steps": 100, "normalize": False}
        return list(batches.stream(split, stores, plan, CONFIG, **steps))

    other = FakeSplit(lengths() + 320)
    with pytest.raises(ValueError, match=r"'utterance0' has \d+ labels, its \d+ samples at 100"):
        read(other, stores[:1])
    renamed = FakeSplit(lengths())
    renamed.ids[3] = "stranger"
    with pytest.raises(ValueError, match="no labels for utterance 'stranger'"):
        read(renamed, stores)
    wrong_rate = label_store(tmp_path / "labels", split, rate=100)
    wrong_rate.card["rate"] = 50
    with pytest.raises(ValueError, match=r"another rate.*run hubert label again"):
        read(split, [wrong_rate])
    truncated = FakeSplit(lengths())
    truncated.audio = lambda position, start, stop: np.zeros(10, np.float32)
    with pytest.raises(ValueError, match=r"gave audio of shape \(10,\).*hubert prepare"):
        read(truncated, stores)
