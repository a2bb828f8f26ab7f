# SPDX-License-Identifier: Apache-2.0
"""`hubert ...`, which kills itself, all its processes, at the n-th change that it makes on disk.

    python tests/chaos/launcher.py STAGE ...

    CHAOS_FOLDER=FOLDER    changes below FOLDER are counted, whichever process makes them:
    CHAOS_CHANGES=FILE     a line for each, with the time: what, name
    CHAOS_KILL=N:SECONDS   SIGKILL so long after line N was written, which is before the change
    CHAOS_SHARD_SECONDS=S  shards of features and labels may be so short, so that there are some,
                           and k-means keeps where it stands after every batch

What Python is about to do to a file or folder is told to an audit hook beforehand: opening for
writing, creating, renaming, linking, removing. So every state that a kill between two changes
leaves on disk is reached by some N, before a rename as well as after it, and Orbax' own renames are
among them. What tensorstore and array_record write from C++ is not seen; a kill some time after a
change finds them in the middle of it.
"""

import os
import signal
import sys
import threading
import time

EVENTS = {"open", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def watch(folder: str, changes: str, kill: str) -> None:
    """Counts the changes below `folder` from here on, and kills where `kill` says so."""
    file = os.open(changes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    number, _, seconds = kill.partition(":")
    counting = threading.Lock()  # of this process; two of them may both see the number reached

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or (event == "open" and not (args[2] or 0) & WRITES):
            return
        path = absolute(args[0], -1 if event == "open" else args[-1])
        if path is None or not path.startswith(folder):
            return
        with counting:
            line = f"{time.time():.6f}\t{event}\t{path.removeprefix(folder).lstrip('/')}\n"
            os.write(file, line.encode())
            done = os.pread(reading, 1 << 20, 0).count(b"\n") if kill else 0
        if kill and done == int(number):
            if float(seconds) > 0:
                timer = threading.Timer(float(seconds), end)
                timer.daemon = True
                timer.start()
            else:
                end()

    reading = os.open(changes, os.O_RDONLY)
    sys.addaudithook(hook)


def absolute(name: object, folder: object) -> str | None:
    """The path that an event is about; shutil.rmtree names files within an open folder."""
    if isinstance(name, int):
        return None
    path = os.fsdecode(name)  # type: ignore[arg-type]
    if not os.path.isabs(path) and isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)


def end() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


if "CHAOS_FOLDER" in os.environ:  # in the workers of prepare too, which begin with this file
    watch(os.environ["CHAOS_FOLDER"], os.environ["CHAOS_CHANGES"], os.environ.get("CHAOS_KILL", ""))

if __name__ == "__main__":
    from hubert_jax import cli

    cli.keep_compiled_programs()
    if "CHAOS_SHARD_SECONDS" in os.environ:
        from hubert_jax import extract
        from hubert_jax.stages import cluster

        extract.MIN_SHARD_SECONDS = float(os.environ["CHAOS_SHARD_SECONDS"])
        cluster.KEEP_SECONDS = 0.0
    cli.main()
