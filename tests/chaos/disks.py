# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, or read-only: a small tmpfs as work directory, which takes root to mount."""

import contextlib
import os
import pathlib
import random
import subprocess
from collections.abc import Iterator

from tests.chaos import compare, kills
from tests.chaos.project import Project, Ran

PAGE = 4096  # what a tmpfs is measured in
PLENTY = 2**30  # bytes
# Reports at every step and no checkpoint before the end: metrics.jsonl is what fills the disk.
MANY_METRICS = ("--config.train.report_every=1", "--config.checkpoints.every=1000")


@contextlib.contextmanager
def mounted(folder: pathlib.Path) -> Iterator[bool]:
    """Whether `folder` is a disk of its own within; not where the mount is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "chaos", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: pathlib.Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def used(folder: pathlib.Path) -> int:
    """Bytes taken on the disk that a folder is."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def full(project: Project, stage: str, share: float, *more: str) -> list[str]:
    """A stage with room for a share of what it writes, then with room enough; what was lost."""
    project.restore(project_end(project, stage))
    needed = used(project.work)
    project.restore(stage)
    taken = used(project.work)
    room = int(share * (needed - taken)) // PAGE * PAGE
    remount(project.work, f"size={taken + room}")
    try:
        ran = project.run(stage, *more)
    finally:
        remount(project.work, f"size={PLENTY}")
    faults = refusal(project, ran, "no space left")
    faults += completed(project, stage)
    return [f"{stage}, disk full after {room} bytes: {fault}" for fault in faults]


def full_of_metrics(project: Project, rng: random.Random) -> list[str]:
    """Room for the first lines of metrics.jsonl alone."""
    project.restore("pretrain")
    taken = used(project.work)
    room = rng.randint(5, 6) * PAGE  # a card, the two files of logs/, and one more page of them
    remount(project.work, f"size={taken + room}")
    try:
        ran = project.run("pretrain", *MANY_METRICS)
    finally:
        remount(project.work, f"size={PLENTY}")
    faults = refusal(project, ran, "no space left")
    faults += completed(project, "pretrain")
    return [f"metrics, disk full after {room} bytes: {fault}" for fault in faults]


def read_only(project: Project, stage: str) -> list[str]:
    project.restore(stage)
    remount(project.work, "ro")
    try:
        ran = project.run(stage)
    finally:
        remount(project.work, "rw")
    faults = refusal(project, ran, "read-only")
    faults += completed(project, stage)
    return [f"{stage}, read-only: {fault}" for fault in faults]


def project_end(project: Project, stage: str) -> str:
    """The stage after this one, whose beginning is this one's end."""
    return project.after(stage).name


def refusal(project: Project, ran: Ran, reason: str) -> list[str]:
    """Unless it is one error, in words, which names the reason and a file in the work directory."""
    if not ran.error:
        return [f"code {ran.code}:\n{ran.output}"]
    if reason not in ran.error.lower() or str(project.work) not in ran.error:
        return [f"unclear: {ran.error}"]
    return []


def completed(project: Project, stage: str, **environment: str) -> list[str]:
    """The same command, now that it can: it must end as the reference did."""
    newest, resumed = kills.newest_step(project.work), []
    ran = project.run(stage, **environment)
    if ran.code:
        return [f"started again: code {ran.code}:\n{ran.output}"]
    faults = kills.repeated(ran, newest, resumed)
    faults += compare.differences(project.work, project.after(stage), resumed)
    return faults + kills.litter(project)
