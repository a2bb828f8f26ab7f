# SPDX-License-Identifier: Apache-2.0
"""SIGKILL and SIGTERM at any moment; then the same command until it is done.

A trial is lost where the second start fails, or ends with anything but the reference's files, or
repeats more than it should: a shard that was whole is written again, k-means begins anew, or
training goes on from another checkpoint than the newest one.
"""

import os
import pathlib
import re
import signal
import time

from hubert_jax.data import leftovers
from tests.chaos import compare
from tests.chaos.project import CHECKPOINT_EVERY, Project, Ran, Running, clear

# Of a checkpoint that is being written in the background, training may be this far ahead.
STEPS_AHEAD = 2 * CHECKPOINT_EVERY
GRACE_SECONDS = 30.0  # SLURM's default between SIGTERM and SIGKILL; Kubernetes' as well
GOES_ON = "k-means goes on after"


def trial(project: Project, stage: str, moments: list[str]) -> list[str] | None:
    """Kills a stage at each of the moments, start after start; what was lost, in words.

    None where the stage was done before the first of them.
    """
    project.restore(stage)
    faults, resumed = [], []
    was_killed = False
    for moment in [*moments, ""]:
        newest, shards = newest_step(project.work), whole_shards(project.work)
        has_state = any(project.work.glob("*/codebook.unfinished.npz"))
        ran = project.run(stage, CHAOS_KILL=moment)
        is_killed = ran.code == -9 and bool(moment)
        was_killed |= is_killed
        if ran.code and not is_killed:
            return [f"{stage}, {moment or 'started again'}: code {ran.code}:\n{ran.output}"]
        if shards - whole_shards(project.work):
            faults.append(f"{len(shards - whole_shards(project.work))} whole shards made again")
        faults += repeated(ran, newest, resumed)
        if not is_killed:
            if (
                has_state
                and "codebook.npz: done before" not in ran.output
                and GOES_ON not in ran.output
            ):
                faults.append("k-means began anew")
            break
        if steps_ahead(project) > STEPS_AHEAD:
            faults.append(f"{steps_ahead(project)} steps are not in a checkpoint")
    faults += compare.differences(project.work, project.after(stage), resumed)
    faults += litter(project)
    return [f"{stage}, {moments}: {fault}" for fault in faults] if was_killed else None


def repeated(ran: Ran, newest: int, resumed: list[int]) -> list[str]:
    """Training must go on at the newest checkpoint; where it did is added to `resumed`."""
    found = re.search(r"going on after step (\d+)", ran.output)
    if not found:
        begins = "parameters on" in ran.output
        return (
            [f"training began anew, there was a checkpoint of {newest}"]
            if newest and begins
            else []
        )
    resumed.append(int(found[1]))
    return [] if int(found[1]) == newest else [f"went on after {found[1]}, not {newest}"]


def newest_step(work: pathlib.Path) -> int:
    """Of the whole checkpoints; 0 where there is none."""
    steps = [int(p.name) for p in work.glob("it1/checkpoints/*") if p.name.isdigit()]
    return max(steps, default=0)


def steps_ahead(project: Project) -> int:
    """How many steps, of those that were reported, are not in a checkpoint."""
    path = project.work / "it1" / "logs" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [int(re.search(r'"step": (\d+)', x)[1]) for x in lines if x.endswith("\n")]  # type: ignore[index]
    return max(steps, default=0) - newest_step(project.work)


def whole_shards(work: pathlib.Path) -> set[tuple[int, int]]:
    """Of shards and exported files that are whole, the inodes and times: renamed, they stay."""
    paths = [p for p in work.rglob("*.npy") if not p.name.startswith(".")]
    paths += work.glob("corpus/*.array_record-*")
    paths += [
        p
        for p in work.glob("corpus/unfinished/[!.]*.array_record")
        if p.with_suffix(".npz").exists()
    ]
    return {(p.stat().st_ino, p.stat().st_mtime_ns) for p in paths}


def litter(project: Project) -> list[str]:
    """What is left in the folder for temporary files, and in shared memory since the trial began.

    There it is what carries the mark of a process that is gone, or was made without any mark. Of
    other tests that run beside this one it is gone at a second look.
    """
    folder = project.base / "temporary"
    shared = left_shared() - project.shared_before
    if shared:
        time.sleep(2.0)
        shared &= left_shared()
    paths = [*folder.iterdir(), *shared]
    clear(folder)
    return [f"{path} left over" for path in sorted(paths)]


def left_shared() -> set[pathlib.Path]:
    return {*leftovers.in_shared_memory(), *unmarked()}


def unmarked() -> list[pathlib.Path]:
    """Shared memory and semaphores as Python names them."""
    return [*leftovers.SHARED.glob("psm_*"), *leftovers.SHARED.glob("sem.mp-*")]


def loaders(project: Project, number: int, delay: float) -> list[str]:
    """Training whose batches other processes load, signalled some time after a checkpoint.

    Signal 15 to all of them: it saves first. 9 to training alone: the others end by themselves;
    -9 to all: nobody is left to remove their shared memory. Then the same command, loading in
    threads; what was lost.
    """
    project.restore("pretrain")
    run = project.start("pretrain", "--config.batch.num_workers=2")
    while newest_step(project.work) == 0 and run.process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    at_work = list(leftovers.SHARED.glob("sem.h*"))
    (os.kill if number == signal.SIGKILL else os.killpg)(run.process.pid, abs(number))
    ran, ended = run.wait(), time.monotonic()
    faults = []
    if ran.code not in (0, 130 if number == signal.SIGTERM else -abs(number)):
        faults.append(f"code {ran.code}:\n{ran.output}")
    while is_group(run.process.pid) and time.monotonic() < ended + GRACE_SECONDS:
        time.sleep(0.05)
    if is_group(run.process.pid):
        faults.append(f"processes are left {GRACE_SECONDS} s after")
        run.kill()
    if number < 0 and ran.code and at_work and not leftovers.in_shared_memory():
        faults.append("nothing of the loaders was left: this trial shows nothing")
    newest, resumed = newest_step(project.work), []
    again = project.run("pretrain")
    if again.code:
        faults.append(f"started again: code {again.code}:\n{again.output}")
    faults += repeated(again, newest, resumed)
    faults += compare.differences(project.work, project.after("pretrain"), resumed)
    faults += litter(project)
    return [f"loaders, signal {number}: {fault}" for fault in faults]


def is_group(number: int) -> bool:
    """Whether a process of the group is alive."""
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def terminate(project: Project, stage: str, moment: str) -> tuple[list[str], float, int]:
    """SIGTERM at a moment, then the same command; (what was lost, seconds to the end, the code)."""
    project.restore(stage)
    number, _, seconds = moment.partition(":")
    run = project.start(stage)
    while len(run.changes) < int(number) and run.process.poll() is None:
        time.sleep(0.002)
    time.sleep(float(seconds))
    return _terminated(project, stage, run, f"SIGTERM at {moment}")


def terminate_compiling(project: Project, seconds: float) -> tuple[list[str], float, int]:
    """As `terminate`, of a training that finds no compiled programs, `seconds` after it began."""
    project.restore("pretrain")
    run = project.start("pretrain", JAX_ENABLE_COMPILATION_CACHE="false")
    metrics = project.work / "it1" / "logs" / "metrics.jsonl"
    while not metrics.exists() and run.process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    lost, took, code = _terminated(
        project, "pretrain", run, f"SIGTERM, compiling, after {seconds:.2f} s"
    )
    if code not in (0, 130):
        lost.append(f"code {code}: not heeded")
    return lost, took, code


def _terminated(
    project: Project, stage: str, run: Running, what: str
) -> tuple[list[str], float, int]:
    signalled = time.monotonic()
    run.process.terminate()
    ran = run.wait()
    took = time.monotonic() - signalled
    resumed: list[int] = []
    stopped = re.search(
        r"stopped by SIGTERM (after step (\d+); it is saved|before its first step)", ran.output
    )
    newest = newest_step(project.work)
    faults = []
    if ran.code not in (0, 130, -15):
        faults.append(f"ended with {ran.code}:\n{ran.output}")
    if (ran.code == 130) != bool(stopped) or (stopped and int(stopped[2] or 0) != newest):
        faults.append(f"code {ran.code}, newest checkpoint {newest}:\n{ran.output}")
    if took > GRACE_SECONDS:
        faults.append(f"took {took:.1f} s to end")
    again = project.run(stage)
    if again.code:
        faults.append(f"started again: code {again.code}:\n{again.output}")
    faults += repeated(again, newest, resumed)
    faults += compare.differences(project.work, project.after(stage), resumed) + litter(project)
    return [f"{stage}, {what}: {fault}" for fault in faults], took, ran.code
