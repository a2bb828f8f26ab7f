# SPDX-License-Identifier: Apache-2.0
"""Everything that can be done to a run, as often as there is time, and what was lost.

    make chaos                                                        # 30 and 15 minutes
    python -m tests.chaos.run --seed=0 --minutes=10 --only=SIGKILL
    python -m tests.chaos.run --processes=2 --minutes=15              # of several: SIGKILL only

Prints the table of docs/RELIABILITY.md; the exit code is 1 where something was lost. Needs root for
the full and read-only disks, which are left out otherwise.
"""

import argparse
import functools
import logging
import pathlib
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hubert_jax import logs
from tests.chaos import disks, elastic, folders, kills, programs
from tests.chaos.project import WAYS, Project
from tests.chaos.several import SeveralProcesses


class Trial(NamedTuple):
    fault: str  # a row of the table
    what: str
    lost: Callable[[], list[str] | None]  # in words; None: it did not come to the fault


class Chaos:
    """A project with its reference, and the trials that can be made with it."""

    def __init__(self, project: Project, seed: int, *, has_disk: bool):
        self.project, self.has_disk = project, has_disk
        self.rng = random.Random(seed)
        self.notes: list[str] = []

    def once(self) -> Iterator[Trial]:
        """What is tried once, or once for each stage. With several processes: nothing."""
        project, rng = self.project, self.rng
        if project.num_processes > 1:
            return

        def trial(fault: str, what: str, function: Callable, *args) -> Trial:
            return Trial(fault, what, functools.partial(function, *args))

        yield trial("other devices: 1, 4, 8, 1", "pretrain", self.moved)
        yield trial("a second run in the work directory", "3 times", self.two_runs)
        yield trial("a lock whose run was killed", "run", lambda: self.taken_over)
        for edit in folders.EDITS:
            what = f"{edit[1]}: {edit[2]}"
            yield trial("a card edited by hand", what, folders.edited, project, *edit)
        for stage in ("pretrain", "features of a layer", "export units"):
            yield trial(
                "cards without what 0.1.0 had not", stage, folders.of_before, project, stage
            )
        for stage, name in folders.CARDS:
            yield trial("a card of a later format", name, folders.of_later, project, stage, name)
        for what in ("killed", "cut short", "emptied"):
            fault, seconds = "compiled programs damaged", rng.uniform(0, 0.002)
            yield trial(fault, what, programs.damaged, project, what, seconds)
        if self.has_disk:
            for stage in project.stages:
                yield trial("a full disk", stage, disks.full, project, stage, rng.random())
            fault = "metrics.jsonl on a full disk"
            yield trial(fault, "pretrain", disks.full_of_metrics, project, rng)
            for stage in project.stages:
                yield trial("a read-only work directory", stage, disks.read_only, project, stage)
        for number, fault in [
            (15, "SIGTERM to training and its loaders"),
            (9, "SIGKILL of training alone"),
            (-9, "SIGKILL of training and its loaders"),
        ] * 2:
            yield trial(fault, "pretrain", kills.loaders, project, number, rng.uniform(0, 1))
        for _ in range(6):
            fault, seconds = "SIGTERM to training that compiles", rng.uniform(0, 6)
            yield trial(fault, f"after {seconds:.2f} s", self.terminated_compiling, seconds)
        for stage in [*["pretrain"] * 4, *project.stages]:
            yield trial(f"SIGTERM in {row(stage)}", stage, self.terminated, stage)

    def kills(self) -> Iterator[Trial]:
        """SIGKILL in every stage in turn, without end; every fourth one is killed twice."""
        number = 0
        while True:
            for stage in self.project.stages:
                way = WAYS[number % len(WAYS)]
                count = 2 if number % 4 == 3 else 1
                moments = [self.project.draw(stage, way, self.rng) for _ in range(count)]
                lost = functools.partial(kills.trial, self.project, stage, moments)
                yield Trial(f"SIGKILL in {row(stage)}", f"{stage}, {way} {moments}", lost)
            number += 1

    def moved(self) -> list[str]:
        found = elastic.moved(self.project)
        self.notes.append(
            f"1, 4, 8, 1 devices, going on after {found.resumed}: losses within {found.loss:.1g}"
            f" (relative) of those on one device, parameters within {found.parameters:.1g}; losses"
            f" of two reports differ by {found.control:.1g} at least"
        )
        return found.faults

    def two_runs(self) -> list[str]:
        refused, self.taken_over = folders.two_runs(self.project)
        return refused

    def terminated_compiling(self, seconds: float) -> list[str] | None:
        lost, took, code = kills.terminate_compiling(self.project, seconds)
        self.notes.append(f"SIGTERM to training that compiles: code {code} after {took:.1f} s")
        return lost if code else None

    def terminated(self, stage: str) -> list[str] | None:
        lost, seconds, code = kills.terminate(
            self.project, stage, self.project.draw(stage, "time", self.rng)
        )
        if stage == "pretrain":
            self.notes.append(f"SIGTERM in pretrain: code {code} after {seconds:.1f} s")
        return lost if code else None


def row(stage: str) -> str:
    """'label by a layer' is label."""
    words = stage.split()
    return stage if words[0] == "export" else words[0]


def run(chaos: Chaos, *, seconds: float, only: str) -> tuple[dict[str, list[int]], list[str]]:
    """({fault: [tried, survived, lost]}, what was lost) of all trials within the time."""
    counts: dict[str, list[int]] = {}
    lost: list[str] = []
    end = time.monotonic() + seconds

    def attempt(trial: Trial) -> None:
        if not re.search(only, trial.fault):
            return
        found = trial.lost()
        outcome = "came too late" if found is None else found or "survived"
        print(f"{trial.fault}: {trial.what}: {outcome}", file=sys.stderr, flush=True)
        if found is not None:
            count = counts.setdefault(trial.fault, [0, 0, 0])
            count[0] += 1
            count[2 if found else 1] += 1
            lost.extend(found)

    for trial in chaos.once():
        attempt(trial)
    for number, trial in enumerate(chaos.kills()):
        if number >= len(chaos.project.stages) and time.monotonic() > end:
            break
        attempt(trial)
    return counts, lost


def table(counts: dict[str, list[int]]) -> str:
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [*sorted(counts.items()), ("all", total)]
    lines = [["fault", "tried", "survived", "lost"]]
    return logs.table(lines + [[fault, *map(str, count)] for fault, count in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="kills go on until then")
    parser.add_argument("--processes", type=int, default=1, help="of every run (1)")
    parser.add_argument("--only", default="", help="faults in whose name this is found")
    args = parser.parse_args()
    started = time.monotonic()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of files it never wrote
    base = pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    with disks.mounted(base / "work") as has_disk:
        several = args.processes > 1
        project = SeveralProcesses(base, args.processes) if several else Project(base)
        project.make_reference()
        seconds = 60 * args.minutes - (time.monotonic() - started)
        chaos = Chaos(project, args.seed, has_disk=has_disk)
        counts, lost = run(chaos, seconds=seconds, only=args.only)
    shutil.rmtree(base)
    print(table(counts))
    print("\n".join(["", *chaos.notes, *project.notes()]))
    if not has_disk and args.processes == 1:
        print("no full and read-only disks: a tmpfs cannot be mounted here (root can)")
    minutes = (time.monotonic() - started) / 60
    print(f"seed {args.seed}, {time.strftime('%Y-%m-%d')}, {minutes:.0f} minutes")
    print("\n\n".join(lost))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
