# SPDX-License-Identifier: Apache-2.0
"""One run on 1, 2 and 4 processes, by launch/local_processes.sh: the same corpus, centres, labels
and losses; and the same losses on every layout of eight devices.

The long comparison takes minutes: pytest -m several_processes
"""

import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from hubert_jax import config_files, extract, logs
from hubert_jax.data import arrays, cards, codebooks
from hubert_jax.stages import cluster, features, label, prepare, pretrain
from tests.test_loop import DEMO, SIZES, write_tones

LAUNCHER = DEMO.parents[1] / "launch" / "local_processes.sh"
# `hubert`, with shards so short that this corpus has one for every process.
MIN_SHARD_SECONDS = 2.0
HUBERT = """#!/bin/sh
exec {python} -c '
from hubert_jax import cli, extract
extract.MIN_SHARD_SECONDS = {seconds}
cli.main()' "$@"
"""
NUM_STEPS, NUM_QUICK_STEPS = 20, 4
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FLAGS = [
    *SIZES, "corpus.num_shards=4", "features.num_shards=4", "labels.num_shards=4",
    f"train.num_steps={NUM_STEPS}", "train.report_every=1", "train.validate_every=20",
    "checkpoints.every=20", "kmeans.max_passes=2", "kmeans.lloyd_passes=2",
]  # fmt: skip
MESHES = {
    "data 8": dict(data=8, fsdp=1, tensor=1),
    "fsdp 8": dict(data=1, fsdp=8, tensor=1),
    "2 x 2 x 2": dict(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """launch(processes, devices of each, stage, work directory, *overrides): runs it."""
    folder = tmp_path_factory.mktemp("several")
    write_tones(folder / "tones")
    hubert = folder / "bin" / "hubert"
    hubert.parent.mkdir()
    hubert.write_text(HUBERT.format(python=sys.executable, seconds=MIN_SHARD_SECONDS))
    hubert.chmod(0o755)

    def run(processes: int, devices: int, stage: str, workdir: pathlib.Path, *overrides: str):
        environment = os.environ | {
            "PATH": f"{hubert.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(DEMO.parents[1]),
            "PORT": str(random.randrange(20_000, 30_000)),
            "XLA_FLAGS": QUICK_COMPILATION,
        }
        stage, _, iteration = stage.partition(":")
        config = f"{DEMO}:{iteration}" if iteration else str(DEMO)
        flags = [f"corpus.train={folder / 'tones'}", *FLAGS, *overrides]
        done = subprocess.run(
            [LAUNCHER, str(processes), str(devices), stage, f"--config={config}",
             f"--workdir={workdir}", "--heartbeat_timeout=600",
             *(f"--config.{flag}" for flag in flags)],
            env=environment, capture_output=True, text=True, timeout=1_200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-4_000:]
        return workdir

    run.tones = folder / "tones"  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    """The work directory of one process with one device, two iterations."""
    workdir = tmp_path_factory.mktemp("alone")
    return launch(1, 1, "run", workdir, "iterations=('it1','it2')")


def settings(iteration: str, tones: pathlib.Path, *overrides: str):
    """The same config in this process."""
    flags = [f"--config.{flag}" for flag in (f"corpus.train={tones}", *FLAGS, *overrides)]
    return config_files.load(f"{DEMO}:{iteration}", flags)


def losses(workdir: pathlib.Path) -> np.ndarray:
    """Of every step of it1."""
    lines = logs.read_metrics(workdir / "it1" / "logs" / "metrics.jsonl")
    found = [line["train/masked_loss"] for line in lines if "train/masked_loss" in line]
    assert lines[-1]["step"] in (NUM_STEPS, NUM_QUICK_STEPS)
    return np.array(found)


def largest_difference(workdir: pathlib.Path, other: pathlib.Path) -> float:
    """Of the losses of two runs, relative."""
    return float(np.max(np.abs(losses(workdir) / losses(other) - 1)))


def label_bytes(workdir: pathlib.Path, iteration: str) -> dict[str, str]:
    """Digests of the labels' shards, by split and file."""
    folders = {split: workdir / iteration / "labels" / split for split in ("train", "validation")}
    return {
        f"{split}/{path.name}": cards.digest(path)
        for split, folder in folders.items()
        for path in sorted(folder.glob("*.npy"))
    }


def copied(workdir: pathlib.Path, to: pathlib.Path, *without: str) -> pathlib.Path:
    shutil.copytree(workdir, to)
    for name in without:
        shutil.rmtree(to / name)
    return to


def compare(workdir: pathlib.Path, alone: pathlib.Path) -> float:
    """Everything of it1; returns the largest relative difference of a loss."""
    for name in ("train.npz", "validation.npz", "train.phones.npz"):
        assert cards.digest(workdir / "corpus" / name) == cards.digest(alone / "corpus" / name)
    ours, theirs = (
        codebooks.read_centers(folder / "it1" / "codebook.npz") for folder in (workdir, alone)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert label_bytes(workdir, "it1") == label_bytes(alone, "it1")
    difference = largest_difference(workdir, alone)
    print(f"centres: {np.max(np.abs(ours - theirs)):.2g}, losses: {difference:.2g} relative")
    assert difference < 1e-4
    return difference


@pytest.mark.several_processes
def test_two_processes_make_what_one_makes(launch, tmp_path, monkeypatch):
    """The share of each is a real one: two and more shards of everything."""
    quick = ("iterations=('it1',)", f"train.num_steps={NUM_QUICK_STEPS}")
    workdir = launch(2, 1, "run", tmp_path / "work", *quick)
    for store in ("features", "labels/train", "labels/validation"):
        assert arrays.Store(epath.Path(workdir / "it1" / store)).num_shards >= 2, store
    monkeypatch.setattr(extract, "MIN_SHARD_SECONDS", MIN_SHARD_SECONDS)
    here = epath.Path(tmp_path / "here")
    config = settings("it1", launch.tones, *quick)
    for stage in (prepare, features, cluster, label, pretrain):
        stage.run(config, here)
    compare(workdir, here)
    lines = logs.read_metrics(workdir / "it1" / "logs" / "metrics.jsonl")
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps))  # written by one of them


@pytest.mark.several_processes
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_eight_devices_of_processes_make_what_one_makes(
    launch, alone, tmp_path, processes, devices
):
    compare(launch(processes, devices, "run", tmp_path / "work", "iterations=('it1',)"), alone)


@pytest.mark.several_processes
@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_labels_of_a_layer_are_the_same_bytes(launch, alone, tmp_path, processes, devices):
    workdir = copied(alone, tmp_path / "work", "it2/labels")
    launch(processes, devices, "label:it2", workdir)
    assert label_bytes(workdir, "it2") == label_bytes(alone, "it2")
    assert len(label_bytes(workdir, "it2")) > 2


@pytest.mark.several_processes
@pytest.mark.parametrize("mesh", MESHES)
def test_the_layout_of_eight_devices_changes_no_loss(launch, alone, tmp_path, mesh):
    workdir = copied(alone, tmp_path / "work", "it1/checkpoints", "it1/logs", "it2")
    config = settings("it1", launch.tones)
    config.mesh.update(MESHES[mesh])
    pretrain.run(config, epath.Path(workdir))
    difference = largest_difference(workdir, alone)
    print(f"{mesh}: losses {difference:.2g} relative")
    assert difference < 1e-4


@pytest.mark.several_processes
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 4, "2 x 2 x 2"), (4, 2, "2 x 2 x 2"), (4, 2, "fsdp 8")],
)
def test_layouts_over_processes_change_no_loss(launch, alone, tmp_path, processes, devices, mesh):
    """Twice an axis of the model goes through several processes: through two, and through four."""
    workdir = copied(alone, tmp_path / "work", "it1/checkpoints", "it1/logs", "it2")
    sizes = [f"mesh.{axis}={size}" for axis, size in MESHES[mesh].items()]
    launch(processes, devices, "pretrain:it1", workdir, *sizes)
    difference = largest_difference(workdir, alone)
    print(f"{mesh} on {processes} x {devices}: losses {difference:.2g} relative")
    assert difference < 1e-4


@pytest.mark.several_processes
def test_training_goes_on_on_other_processes(launch, alone, tmp_path):
    """Ten steps on one device, the others on two processes of four."""
    workdir = copied(alone, tmp_path / "work", "it1/checkpoints", "it1/logs", "it2")
    flags = ("checkpoints.every=10", "checkpoints.keep_last=2")
    launch(1, 1, "pretrain:it1", workdir, *flags)
    last = workdir / "it1" / "checkpoints" / str(NUM_STEPS)
    shutil.rmtree(last)
    launch(2, 4, "pretrain:it1", workdir, *flags)
    assert last.is_dir()
    difference = largest_difference(workdir, alone)
    print(f"10 steps on 1 x 1, 10 on 2 x 4: losses {difference:.2g} relative")
    assert 0 < difference < 1e-4  # 0: the second half is the first run's
