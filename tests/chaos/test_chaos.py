# SPDX-License-Identifier: Apache-2.0
"""The short form of `make chaos`, and that its comparison sees what it is there to see."""

import json
import pathlib
import random
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.chaos import compare, disks, kills
from tests.chaos.project import NUM_STEPS, Project
from tests.chaos.several import SeveralProcesses

# Compiling is most of what runs this small do.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
STAGES = ("prepare", "features", "cluster", "label", "pretrain")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    base = tmp_path_factory.mktemp("chaos")
    with disks.mounted(base / "work"):
        made = Project(base, stages=STAGES, xla_flags=XLA_FLAGS)
        made.make_reference()
        yield made


def test_every_stage_killed_once_ends_as_if_nothing_had_happened(project):
    rng = random.Random(0)
    killed = 0
    for stage, way in zip(STAGES, ("rename", "renamed", "change", "time", "rename"), strict=True):
        moment = project.draw(stage, way, rng)
        lost = kills.trial(project, stage, [moment])
        assert not lost, "\n".join(lost)
        killed += lost is not None
    assert killed >= 4  # the fifth may come too late


def test_sigterm_saves_and_goes_on_at_the_same_step(project):
    changes = project.changes["pretrain"]
    names = [change.name for change in changes]
    moment = names.index("it1/checkpoints/5.orbax-checkpoint-tmp") + 1
    lost, seconds, code = kills.terminate(project, "pretrain", f"{moment}:0")
    assert not lost, "\n".join(lost)
    assert code == 130 and seconds < kills.GRACE_SECONDS


def test_a_full_disk_is_an_error_and_costs_nothing_else(project):
    if not project.work.is_mount():
        pytest.skip("a tmpfs cannot be mounted here")
    lost = disks.full(project, "label", 0.5)
    assert not lost, "\n".join(lost)


@pytest.mark.several_processes
def test_one_of_two_processes_killed(tmp_path):
    """Alone, in pretrain in the middle of a checkpoint: the other ends by itself; both go on."""
    made = SeveralProcesses(tmp_path, 2, stages=STAGES, xla_flags=XLA_FLAGS)
    made.make_reference()
    names = [change.name for change in made.changes_of["pretrain"][0]]
    saving = names.index("it1/checkpoints/10.orbax-checkpoint-tmp") + 2
    for stage, moment in (("label", "1/2:0/alone"), ("pretrain", f"0/{saving}:0/alone")):
        lost = kills.trial(made, stage, [moment])
        assert lost == [], lost


@pytest.fixture
def copy(project, tmp_path):
    """(a work directory as the reference left it, the reference)"""
    wanted = project.after("pretrain")
    shutil.copytree(wanted, tmp_path / "work")
    assert compare.differences(tmp_path / "work", wanted) == []
    return tmp_path / "work", wanted


@pytest.mark.parametrize(
    "name",
    [
        "corpus/speech-train.array_record-00000-of-00003", "corpus/train.npz", "corpus/card.json",
        "it1/codebook.npz", "it1/labels/train/shard-00001-of-00004.npy", "it1/features/index.npz",
    ],
)  # fmt: skip
def test_a_flipped_bit_is_a_difference(copy, name):
    found, wanted = copy
    data = bytearray((found / name).read_bytes())
    data[len(data) // 2] ^= 4
    (found / name).write_bytes(data)
    assert compare.differences(found, wanted) == [f"{name}: differs"]


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_flipped_bit_of_a_checkpoint_is_a_difference(copy, item):
    found, wanted = copy
    step = found / "it1" / "checkpoints" / str(NUM_STEPS)
    arrays = {
        name.removeprefix(f"{item}/"): array.copy()
        for name, array in compare.contents(step).items()
        if name.startswith(item)
    }
    name = max(arrays, key=lambda name: arrays[name].size)
    arrays[name].reshape(-1).view(np.uint32)[-1] ^= 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / item, arrays, force=True)
    (difference,) = compare.differences(found, wanted)
    assert difference.endswith(f"{item}/{name} differs")


def test_files_too_many_or_too_few_are_differences(copy):
    found, wanted = copy
    (found / "it1" / ".unfinished-card.json").touch()
    (found / "it1" / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    (found / "empty").mkdir()
    (found / "it1" / "codebook.json").unlink()
    assert set(compare.differences(found, wanted)) == {
        "it1/.unfinished-card.json: left over",
        "it1/checkpoints/15.orbax-checkpoint-tmp/checkpoint: left over",
        "empty: left over",
        "it1/codebook.json: missing",
    }


def test_another_loss_is_a_difference(copy):
    found, wanted = copy
    path: pathlib.Path = found / "it1" / "logs" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["train/seconds"] += 1  # the clock's
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.differences(found, wanted) == []
    rows[2]["train/masked_loss"] += 1e-7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (difference,) = compare.differences(found, wanted)
    assert f"('train', {rows[2]['step']}) differs" in difference
