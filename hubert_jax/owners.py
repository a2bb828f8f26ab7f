# SPDX-License-Identifier: Apache-2.0
"""Who holds the lock of a work directory, and whether that process is still at work.

{"host", "system": its start and its namespace of process numbers, "process",
 "born": of the process, in clock ticks since the boot, "since", "command"}
"""

import contextlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

from hubert_jax import logs

NAME = ".running"  # of the lock, in the work directory
HEARTBEAT = 30.0  # seconds
STALE = 10 * 60.0  # seconds without a heartbeat, after which a run on another host is given up

Owner = dict[str, Any]


class Held(ValueError):
    """Another run is at work in the folder."""

    def __init__(self, folder: Any, owner: Owner, lock: Any):
        super().__init__(
            f"{folder}: another run is at work here: {owner.get('command')}, {name(owner)} since"
            f" {owner.get('since')}. Wait for it, end it, or choose another --workdir. If you know"
            f" that it is gone, remove {lock}"
        )


def this(command: str) -> Owner:
    """This process, at `command`."""
    return {
        "host": socket.gethostname(), "system": _system(),
        "process": os.getpid(), "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command,
    }  # fmt: skip


def name(owner: Owner) -> str:
    return f"process {owner.get('process')} on {owner.get('host')}"


def parse(text: str | bytes) -> Owner:
    """The owner; {} where the text is no lock (of a host that lost its power)."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def is_here(owner: Owner) -> bool:
    """Whether the owner is a process that can be seen from here, so that a look at it tells.

    Of two pods that have one name in turn, the second may be on another node; two containers with
    the host's network have its name, and their own process numbers.
    """
    is_named_so = owner.get("host") == socket.gethostname()
    return is_named_so and owner.get("system", _system()) == _system()  # older locks have none


def is_alive(owner: Owner, *, age: float) -> bool:
    """Whether the owner of a lock whose last heartbeat is `age` seconds ago is still at work."""
    if not is_here(owner):
        return age < STALE
    return owner.get("born") is not None and _born(owner.get("process")) == owner["born"]


def is_heard(owner: Owner, look: Callable[[], Any], *, seconds: float) -> bool:
    """Whether an owner on another host shows up again within so long; waits for that.

    `look` gives what every heartbeat changes, and None once there is no lock. A job that a
    scheduler puts back onto another node finds the lock of its own former self.
    """
    last, deadline = look(), time.monotonic() + seconds
    logs.info(f"the lock is of {name(owner)}: waiting for its heartbeat, at most {seconds:.0f} s")
    while last is not None and time.monotonic() < deadline:
        time.sleep(min(1.0, HEARTBEAT))
        with contextlib.suppress(OSError):  # the next look may get an answer
            found = look()
            if found != last:
                return found is not None  # None: it has ended, and the lock with it
    return False


def exists(process: int) -> bool:
    return _born(process) is not None


def _system() -> str | None:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _born(process: Any) -> str | None:
    """When a process of this host began; None where there is none: numbers are used again."""
    if not isinstance(process, int):
        return None
    stat = pathlib.Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return _without_proc(process)


def _without_proc(process: int) -> str | None:
    """On macOS, only whether there is such a process."""
    if pathlib.Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
