# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that are kept, and damaged: they are compiled again, and that is all."""

import pathlib
import shutil

from tests.chaos import disks
from tests.chaos.project import Project

STAGE = "label"


def damaged(project: Project, what: str, seconds: float) -> list[str] | None:
    """A kill while programs are kept, or all of them cut short or emptied; what was lost."""
    project.restore(STAGE)
    folder = project.base / "other-programs"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder)}
    if what == "killed":
        changes = project.run(STAGE, CHAOS_FOLDER=str(folder), **environment).changes
        written = [n for n, change in enumerate(changes, 1) if change.name.endswith("-cache")]
        if not written:
            return ["no program was kept"]
        project.restore(STAGE)
        shutil.rmtree(folder)
        moment = f"{written[len(written) // 2]}:{seconds}"
        ran = project.run(STAGE, CHAOS_FOLDER=str(folder), CHAOS_KILL=moment, **environment)
        if ran.code != -9:
            return None
    else:
        project.run(STAGE, **environment)
        project.restore(STAGE)
        kept = [path for path in folder.rglob("*-cache") if path.is_file()]
        if not kept:
            return None
        for path in kept:
            cut(path, 0 if what == "emptied" else path.stat().st_size // 2)
    faults = disks.completed(project, STAGE, **environment)
    return [f"programs {what}: {fault}" for fault in faults]


def cut(path: pathlib.Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
