# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a work directory: WORK/.running says whose turn it is (owners.py).

A lock whose process is gone is stale and taken over: on this host a look at the process tells, on
another one the age of the file, whose time is touched every HEARTBEAT seconds. Where a run has
several processes the first one holds the lock. In a bucket, see bucket_locks.py.
"""

import contextlib
import errno
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from hubert_jax import bucket_locks, logs, owners
from hubert_jax.data import cards, leftovers, places

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what disks without hard links say


@contextlib.contextmanager
def held(folder: os.PathLike | str, command: str) -> Iterator[None]:
    """Holds the lock of a work directory.

    Raises owners.Held with host, process and time of whoever has it.
    """
    if not places.is_local(folder):
        with bucket_locks.held(folder, command):
            yield
        return
    path = pathlib.Path(folder) / owners.NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = owners.this(command)
    _take(path, mine)
    _sweep(path)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _take(path: pathlib.Path, mine: owners.Owner) -> None:
    """Creates the lock; in one step, so that of two runs that start together one gets it."""
    unfinished = path.with_name(f"{_beside()}{os.getpid()}")
    try:
        with cards.enough_space(path):
            unfinished.write_text(json.dumps(mine))
        while True:
            try:
                _create(path, unfinished)
                return
            except FileExistsError:
                owner = _read(path)
            now = unfinished.stat().st_mtime  # of the file system's clock, as the lock's is
            age = now - _touched(path, now)
            if owners.is_alive(owner, age=age) and (
                owners.is_here(owner)
                or owners.is_heard(owner, lambda: _touched(path, None), seconds=owners.STALE - age)
            ):
                raise owners.Held(path.parent, _read(path) or owner, path)
            logs.info(f"{path}: of {owners.name(owner)}, which is gone; taken over")
            # Moved away first: of two that take over, one finds it gone and looks again.
            with contextlib.suppress(FileNotFoundError):
                gone = path.with_name(f"{unfinished.name}-stale")
                path.rename(gone)
                gone.unlink()
    finally:
        with contextlib.suppress(FileNotFoundError):  # not even begun, on a disk that is read-only
            unfinished.unlink()


def _create(path: pathlib.Path, unfinished: pathlib.Path) -> None:
    """Fails where there is a lock, and is whole where not, if the disk has links."""
    try:
        os.link(unfinished, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with path.open("x") as file:
            file.write(unfinished.read_text())


def _beside() -> str:
    """How files beside the lock begin, of this host and its namespace of process numbers."""
    return f"{owners.NAME}-{socket.gethostname()}-{leftovers.namespace()}-"


def _sweep(path: pathlib.Path) -> None:
    """Removes what runs that were killed while they took the lock have left beside it."""
    for left in path.parent.glob(f"{_beside()}*"):
        process = left.name.removeprefix(_beside()).removesuffix("-stale")
        if process.isdigit() and (int(process) == os.getpid() or not owners.exists(int(process))):
            left.unlink(missing_ok=True)


def owner_of(folder: os.PathLike | str) -> owners.Owner | None:
    """Who is at work in a folder; None where nobody is."""
    if not places.is_local(folder):
        return bucket_locks.owner_of(folder)
    path = pathlib.Path(folder) / owners.NAME
    owner, now = _read(path), time.time()
    return owner if owner and owners.is_alive(owner, age=now - _touched(path, now)) else None


def _read(path: pathlib.Path) -> owners.Owner:
    """The owner; {} where there is none."""
    try:
        return owners.parse(path.read_bytes())
    except FileNotFoundError:
        return {}


def _touched(path: pathlib.Path, default: Any) -> Any:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return default


def _beat(path: pathlib.Path, ended: threading.Event) -> None:
    while not ended.wait(owners.HEARTBEAT):
        with contextlib.suppress(OSError):  # a full disk or a lost mount ends the run elsewhere
            os.utime(path)
