# SPDX-License-Identifier: Apache-2.0
"""Audio and labels cropped together, by threads or processes, the same on any number of hosts."""

import contextlib
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import pytest

from hubert_jax.data import batches
from hubert_jax.ops import frames
from tests.data import fake_split
from tests.data.fake_split import (
    CONFIG,
    FakeSplit,
    epoch_of,
    label_store,
    lengths,
    make_plan,
    replace,
)


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
    cloudpickle.register_pickle_by_value(fake_split)  # FakeSplit, to the workers
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
    cloudpickle.register_pickle_by_value(fake_split)
    split, stores = corpus
    config = replace(num_workers=2)
    steps = {"first_step": 0, "num_steps": 10_000, "normalize": False}
    have_started = threading.Event()

    def signal_all() -> None:
        while not have_started.wait(0.01):
            send_signals()

    def send_signals() -> None:
        loaders = multiprocessing.active_children()
        for loader, number in itertools.product(loaders, (signal.SIGTERM, signal.SIGINT)):
            os.kill(loader.pid, number)

    starting = threading.Thread(target=signal_all)
    with contextlib.closing(batches.stream(split, stores, make_plan(), config, **steps)) as reader:
        starting.start()
        found = [next(reader)[0] for _ in range(2)]
        have_started.set()
        starting.join()
        send_signals()
        loaders = multiprocessing.active_children()
        assert len(loaders) == 2
        assert found + [next(reader)[0] for _ in range(30)] == list(range(32))
        assert all(loader.is_alive() for loader in loaders)
    assert not any(loader.is_alive() for loader in loaders)


def test_worker_processes_end_with_a_reader_that_is_killed(tmp_path):
    program = f"""
import multiprocessing, pathlib, time
from hubert_jax.data import batches
from tests.data import fake_split as t
if __name__ == "__main__":
    split = t.FakeSplit(t.lengths())
    stores = [t.label_store(pathlib.Path({os.fspath(tmp_path)!r}) / "labels", split, rate=50)]
    steps = dict(first_step=0, num_steps=10_000, normalize=False)
    reader = batches.stream(split, stores, t.make_plan(), t.replace(num_workers=2), **steps)
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
