# SPDX-License-Identifier: Apache-2.0
"""What outlives a process that is killed together with all those that it started: shared memory,
semaphores and temporary folders. Their names say whose they are, and the next command on this
machine removes those whose process is gone.

    /dev/shm/MARK_1a2b, /dev/shm/sem.MARK-abcdefgh, TMPDIR/hubert_jax-HOST-MARK-abcdefgh

MARK is h, two digits for the namespace of process numbers, and the number, in base 36: Python
leaves a name of shared memory ten characters. A temporary folder may be on a disk that other hosts
and namespaces share, so HOST tells all of those apart. Not found are those of a namespace that is
gone (a container that was started again), and of a number that is another process' by now.
"""

import atexit
import contextlib
import functools
import hashlib
import multiprocessing
import os
import pathlib
import re
import shutil
import socket
import tempfile
from multiprocessing import shared_memory

import numpy as np

SHARED = pathlib.Path("/dev/shm")  # Linux; elsewhere there is nothing to be seen of them
IN_SHARED = re.compile(
    r"(?:h([0-9a-z]{2})([0-9a-z]{1,5})_[0-9a-f]+|sem\.h([0-9a-z]{2})([0-9a-z]{1,5})-\w{8})"
)
FOLDER = re.compile(r"hubert_jax-([0-9a-f]{16})-h([0-9a-z]{2})([0-9a-z]{1,5})-\w+")


def mark() -> str:
    """This process, in at most eight characters."""
    return f"h{_short(namespace())}{np.base_repr(os.getpid(), 36).lower()}"


def sign() -> None:
    """Shared memory and semaphores that this process makes from now on have its mark."""
    multiprocessing.current_process()._config["semprefix"] = f"/{mark()}"  # type: ignore[attr-defined]
    shared_memory._SHM_NAME_PREFIX = f"/{mark()}_"  # type: ignore[attr-defined]


def folder() -> str:
    """A new temporary folder, which goes with this process."""
    _remove_at_exit()
    return tempfile.mkdtemp(prefix=f"hubert_jax-{_host()}-{mark()}-")


def sweep() -> None:
    """Removes what processes have left that are gone."""
    for path in in_shared_memory():
        with contextlib.suppress(OSError):  # another one was quicker, or it is somebody else's
            path.unlink()
    for path in _folders():
        found = FOLDER.fullmatch(path.name)
        if found and found[1] == _host() and not _exists(found[3]):
            shutil.rmtree(path, ignore_errors=True)


def in_shared_memory() -> list[pathlib.Path]:
    """What lies in shared memory of processes that are gone."""
    gone = []
    for path in _listed(SHARED):
        found = IN_SHARED.fullmatch(path.name)
        place, process = [x for x in found.groups() if x] if found else ("", "")
        if found and place == _short(namespace()) and not _exists(process):
            gone.append(path)
    return gone


def remove_folders() -> None:
    """The temporary folders of this process."""
    for path in _folders():
        if path.name.startswith(f"hubert_jax-{_host()}-{mark()}-"):
            shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _remove_at_exit() -> None:
    atexit.register(remove_folders)


def _folders() -> list[pathlib.Path]:
    try:
        return _listed(pathlib.Path(tempfile.gettempdir()))
    except OSError:  # there is none to write to
        return []


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@functools.cache
def namespace() -> int:
    """Of process numbers: containers may share what is swept, and count apart."""
    try:
        return int(re.sub(r"\D", "", os.readlink("/proc/self/ns/pid")))
    except OSError:
        return 0


def _short(number: int) -> str:
    return np.base_repr(number % 36**2, 36).lower().zfill(2)


@functools.cache
def _host() -> str:
    """This host since it was started, and this namespace, in 16 characters."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # not Linux
        boot = ""
    text = f"{socket.gethostname()} {boot} {namespace()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _exists(process: str) -> bool:
    try:
        os.kill(int(process, 36), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
