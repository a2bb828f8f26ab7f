# SPDX-License-Identifier: Apache-2.0
"""The project that chaos is let loose on: tones, all stages of two iterations, exports.

Every stage is a command as a user gives it, in a process of its own. An uninterrupted run of them
is the reference; what the work directory looked like before each stage is kept, so that a stage can
be tried again and again, always in the same folder: cards hold paths.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from hubert_jax.data import leftovers
from tests import tones

LAUNCHER = pathlib.Path(__file__).with_name("launcher.py")
NUM_STEPS, CHECKPOINT_EVERY, REPORT_EVERY = 20, 5, 2
SIZES = (
    *tones.SIZES, "corpus.num_workers=2", "corpus.num_shards=3", "features.num_shards=4",
    "labels.num_shards=4", "features.batch_seconds=4.0", "model.num_layers=2", "batch.seconds=16.0",
    f"train.num_steps={NUM_STEPS}", f"train.report_every={REPORT_EVERY}", "train.validate_every=10",
    f"checkpoints.every={CHECKPOINT_EVERY}",
)  # fmt: skip
SHARD_SECONDS = "2.0"  # of features and labels, where a run has ten minutes at least
SECONDS = 180.0  # any command that is still at work then hangs
HANGS = 124  # its code, as timeout(1) has it
WAYS = ("rename", "time", "renamed", "change")  # of drawing the moment of a kill
XLA_FLAGS = "--xla_force_host_platform_device_count={}"


class Change(NamedTuple):
    """A line of the launcher's."""

    time: float
    what: str
    name: str


class Ran(NamedTuple):
    code: int  # negative: the signal that ended it
    output: str  # stdout and stderr
    changes: list[Change]

    @property
    def error(self) -> str:
        """What the command says went wrong, in words; "" where it does not say, or ended well."""
        pattern = r"^hubert \w+: error: (.*?)^Once that is mended"
        found = re.search(pattern, self.output, re.MULTILINE | re.DOTALL)
        return found[1] if found and self.code == 1 else ""


class Project:
    """BASE/work, made and unmade; BASE/before/STAGE, what it was before each stage."""

    num_processes = 1

    def __init__(self, base: pathlib.Path, *, stages: Sequence[str] = (), xla_flags: str = ""):
        self.base, self.work = base, base / "work"
        self.stages = {
            name: x for name, x in commands(base).items() if name in stages or not stages
        }
        self.changes: dict[str, list[Change]] = {}
        self.shared_before: set[pathlib.Path] = set()  # what others have in shared memory
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(base / "programs")
        (base / "temporary").mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
            "TMPDIR": str(base / "temporary"),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "XLA_FLAGS": f"{XLA_FLAGS.format(1)} {xla_flags}",
            "CHAOS_SHARD_SECONDS": SHARD_SECONDS,
            "CHAOS_FOLDER": str(self.work),
        }

    def notes(self) -> list[str]:
        """What is said below the table."""
        return []

    def make_reference(self) -> None:
        """Runs all stages once. Raises RuntimeError where one fails."""
        tones.write(self.base / "tones")
        self.work.mkdir(exist_ok=True)
        for stage in self.stages:
            shutil.copytree(self.work, self.base / "before" / stage)
            ran = self.run(stage)
            if ran.code:
                raise RuntimeError(f"{stage} ended with {ran.code}:\n{ran.output}")
            self.changes[stage] = ran.changes
        shutil.copytree(self.work, self.base / "before" / "end")

    def after(self, stage: str) -> pathlib.Path:
        """The work directory as the stage left it in the reference."""
        names = [*self.stages, "end"]
        return self.base / "before" / names[names.index(stage) + 1]

    def restore(self, stage: str) -> None:
        """The work directory as it was before the stage. The folder itself may be a mount."""
        clear(self.work)
        shutil.copytree(self.base / "before" / stage, self.work, dirs_exist_ok=True)
        self.shared_before = set(leftovers.SHARED.glob("*"))

    def draw(self, stage: str, way: str, rng: random.Random) -> str:
        """A moment of a stage, as the launcher takes it; `way` is one of WAYS."""
        return draw(self.changes[stage], way, rng)

    def start(self, stage: str, *more: str, **environment: str) -> "Running":
        return Running(self, [*self.stages[stage], *more], environment)

    def run(self, stage: str, *more: str, **environment: str) -> Ran:
        return self.start(stage, *more, **environment).wait()


class Running:
    """A command at work."""

    def __init__(self, project: Project, argv: list[str], environment: dict[str, str]):
        number = len(list(project.base.glob("log-*.txt")))
        self.log = project.base / f"log-{number}.txt"
        self._changes = project.base / f"changes-{number}.tsv"
        self._changes.touch()
        self.ran: Ran | None = None
        env = {**project.environment, "CHAOS_CHANGES": str(self._changes), **environment}
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), *argv],
                stdout=file, stderr=file, env=env, start_new_session=True, cwd=project.base,
            )  # fmt: skip

    @property
    def changes(self) -> list[Change]:
        lines = self._changes.read_text().splitlines()
        return [Change(float(t), *rest) for t, *rest in (line.split("\t") for line in lines)]

    def wait(self, seconds: float = SECONDS) -> Ran:
        """How it ended; it is given so long."""
        self.ran = self.ran or self._end(seconds)
        return self.ran

    def _end(self, seconds: float) -> Ran:
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
            return Ran(HANGS, f"hangs, for {seconds} s:\n{self.log.read_text()}", self.changes)
        except BaseException:
            self.kill()
            raise
        return Ran(code, self.log.read_text(), self.changes)

    def kill(self) -> None:
        """With its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)


def clear(folder: pathlib.Path) -> None:
    """Empties a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def draw(changes: list[Change], way: str, rng: random.Random) -> str:
    """A moment, for the launcher: before a rename, right after one, at a change, at some time."""
    renames = [n for n, change in enumerate(changes, 1) if change.what == "os.rename"]
    if way == "rename" and renames:
        return f"{rng.choice(renames)}:0"
    if way == "renamed" and renames:
        return f"{min(rng.choice(renames) + 1, len(changes))}:0"
    if way == "change":
        return f"{rng.randint(1, len(changes))}:0"
    moment = rng.uniform(changes[0].time, changes[-1].time)
    number = sum(change.time <= moment for change in changes)
    return f"{number}:{moment - changes[number - 1].time:.4f}"


def commands(base: pathlib.Path) -> dict[str, list[str]]:
    """The words after `hubert` of every stage, in their order."""
    work, audio = base / "work", base / "tones"
    flags = tones.flags(base, *SIZES[len(tones.SIZES) :])

    def stage(name: str, iteration: str) -> list[str]:
        return [name, f"--config={tones.DEMO}:{iteration}", f"--workdir={work}", *flags]

    checkpoint = f"--checkpoint={work / 'it1' / 'checkpoints'}"
    codebook = f"--codebook={work / 'it2' / 'codebook.npz'}"
    exports = work / "exports"
    return {
        "prepare": stage("prepare", "it1"),
        "features": stage("features", "it1"),
        "cluster": stage("cluster", "it1"),
        "label": stage("label", "it1"),
        "pretrain": stage("pretrain", "it1"),
        "features of a layer": stage("features", "it2"),
        "cluster of a layer": stage("cluster", "it2"),
        "label by a layer": stage("label", "it2"),
        "export features": [
            "export", "features", checkpoint, f"--audio={audio}", "--layer=1",
            f"--out={exports / 'features'}", "--batch_seconds=4",
        ],
        "export units": [
            "export", "units", checkpoint, codebook, f"--audio={audio}",
            f"--out={exports / 'units'}", "--batch_seconds=4",
        ],
        "export labels": [
            "export", "labels", f"--labels={work / 'it1' / 'labels'}",
            f"--corpus={work / 'corpus'}", f"--audio={audio}", f"--out={exports / 'labels'}",
        ],
        "export codebook": [
            "export", "codebook", codebook, f"--out={exports / 'centers.npy'}",
        ],
        "export weights": [
            "export", "weights", checkpoint, "--format=hf", f"--out={exports / 'weights'}",
        ],
    }  # fmt: skip
