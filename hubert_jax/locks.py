# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a work directory: WORK/.running says whose turn it is.

    {"host", "process", "born": of the process, in clock ticks since the boot,
     "since", "command"}        and the file's time is touched every HEARTBEAT seconds

A lock whose process is gone is stale and taken over: on this host a look at the process tells, on
another one its age does. Where a run has several processes the first one holds the lock.
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

from hubert_jax import logs
from hubert_jax.data import cards

NAME = ".running"
HEARTBEAT = 30.0  # seconds
STALE = 10 * 60.0  # seconds without a heartbeat, after which a run on another host is given up
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what disks without hard links say


class Held(ValueError):
    """Another run is at work in the folder."""


@contextlib.contextmanager
def held(folder: os.PathLike | str, command: str) -> Iterator[None]:
    """Holds the lock of a work directory, or raises Held with host, process and time of the owner.

    A folder that is no local path (gs://...) has no lock: nothing there is created exclusively.
    """
    if "://" in os.fspath(folder):
        yield
        return
    path = pathlib.Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {
        "host": socket.gethostname(), "process": os.getpid(), "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command,
    }  # fmt: skip
    _take(path, mine)
    _sweep(path, socket.gethostname())
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


def _take(path: pathlib.Path, mine: dict[str, Any]) -> None:
    """Creates the lock; in one step, so that of two runs that start together one gets it."""
    unfinished = path.with_name(f"{NAME}-{mine['host']}-{mine['process']}")
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
            if is_alive(owner, age=age) and (_is_here(owner) or _is_heard(path, owner, age)):
                raise Held(
                    f"{path.parent}: another run is at work here: {owner.get('command')}, process"
                    f" {owner.get('process')} on {owner.get('host')} since {owner.get('since')}."
                    " Wait for it, end it, or choose another --workdir. If you know that it is"
                    f" gone, remove {path}"
                )
            logs.info(
                f"{path}: of process {owner.get('process')} on {owner.get('host')}, which is gone;"
                " taken over"
            )
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


def _is_heard(path: pathlib.Path, owner: dict[str, Any], age: float) -> bool:
    """Whether an owner on another host shows up again before it counts as gone; waits for that.

    A job that a scheduler puts back onto another node finds the lock of its own former self.
    """
    left, last = STALE - age, _touched(path, 0.0)
    logs.info(
        f"{path}: of process {owner.get('process')} on {owner.get('host')}, silent for {age:.0f} s;"
        f" waiting for its heartbeat, at most {left:.0f} s"
    )
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(min(1.0, HEARTBEAT))
        touched = _touched(path, 0.0)
        if touched != last:
            return touched > 0  # 0: it has ended, and the lock with it
    return False


def _sweep(path: pathlib.Path, host: str) -> None:
    """Removes what runs that were killed while they took the lock have left beside it."""
    for left in path.parent.glob(f"{NAME}-{host}-*"):
        process = left.name.removeprefix(f"{NAME}-{host}-").removesuffix("-stale")
        if process.isdigit() and (int(process) == os.getpid() or _born(int(process)) is None):
            left.unlink(missing_ok=True)


def is_alive(owner: dict[str, Any], *, age: float) -> bool:
    """Whether the owner of a lock whose last heartbeat is `age` seconds ago is still at work."""
    if not _is_here(owner):
        return age < STALE
    return owner.get("born") is not None and _born(owner.get("process")) == owner["born"]


def _is_here(owner: dict[str, Any]) -> bool:
    return owner.get("host") == socket.gethostname()


def owner_of(folder: os.PathLike | str) -> dict[str, Any] | None:
    """Who is at work in a folder; None where nobody is."""
    path = pathlib.Path(folder) / NAME
    owner, now = _read(path), time.time()
    return owner if owner and is_alive(owner, age=now - _touched(path, now)) else None


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The owner; {} where there is none or the file is no lock (a host that lost its power)."""
    try:
        owner = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _touched(path: pathlib.Path, default: float) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return default


def _born(process: Any) -> str | None:
    """When a process of this host began; None where there is none: numbers are used again."""
    if not isinstance(process, int):
        return None
    stat = pathlib.Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return _exists(process)


def _exists(process: int) -> str | None:
    """Without /proc (macOS), only whether there is such a process."""
    if pathlib.Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _beat(path: pathlib.Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # a full disk or a lost mount ends the run elsewhere
            os.utime(path)
