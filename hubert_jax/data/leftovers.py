# SPDX-License-Identifier: Apache-2.0
"""What outlives a process that is killed together with all those that it started: shared memory,
semaphores and temporary folders. Their names say whose they are, and the next command removes those
whose owner is gone.

    /dev/shm/OWNER_1a2b, /dev/shm/sem.OWNER-abcdefgh, TMPDIR/hubert_jax-OWNER-abcdefgh

OWNER is h, two digits for the namespace of process numbers, and the number, in base 36: Python
leaves a name of shared memory ten characters.
"""

import contextlib
import multiprocessing
import os
import pathlib
import re
import shutil
import tempfile
from multiprocessing import shared_memory

import numpy as np

SHARED = pathlib.Path("/dev/shm")  # Linux; elsewhere there is nothing to be seen of them
NAMES = re.compile(r"(?:sem\.|hubert_jax-)?h([0-9a-z]{2})([0-9a-z]{1,5})[-_]\w+")


def owner() -> str:
    """This process, in at most eight characters."""
    return f"h{_namespace()}{np.base_repr(os.getpid(), 36).lower()}"


def mark() -> None:
    """Shared memory and semaphores that this process makes from now on have its name."""
    multiprocessing.current_process()._config["semprefix"] = f"/{owner()}"  # type: ignore[attr-defined]
    shared_memory._SHM_NAME_PREFIX = f"/{owner()}_"  # type: ignore[attr-defined]


def sweep() -> None:
    """Removes what processes have left that are gone."""
    for folder in (SHARED, pathlib.Path(tempfile.gettempdir())):
        for path in of_the_gone(folder):
            _remove(path)


def of_the_gone(folder: pathlib.Path) -> list[pathlib.Path]:
    """What lies in a folder of processes that are gone."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    found = [(path, NAMES.fullmatch(path.name)) for path in paths]
    return [
        path
        for path, name in found
        if name and name[1] == _namespace() and not _exists(int(name[2], 36))
    ]


def folder() -> str:
    """A new temporary folder with the name of this process."""
    return tempfile.mkdtemp(prefix=f"hubert_jax-{owner()}-")


def remove_folders() -> None:
    """The temporary folders of this process, which ends without tidying up."""
    for path in pathlib.Path(tempfile.gettempdir()).glob(f"hubert_jax-{owner()}-*"):
        _remove(path)


def _namespace() -> str:
    """Of process numbers: containers may share what is swept, and count apart."""
    try:
        number = int(re.sub(r"\D", "", os.readlink("/proc/self/ns/pid")))
    except OSError:
        number = 0
    return np.base_repr(number % 36**2, 36).lower().zfill(2)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # another one was quicker, or it is somebody else's
            path.unlink()
