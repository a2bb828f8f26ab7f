# SPDX-License-Identifier: Apache-2.0
"""Nothing is left of a process that was killed with all its children, once another one starts."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import pytest

from hubert_jax.data import leftovers, places

MAKE = """
import multiprocessing, sys, time
from multiprocessing import shared_memory
from hubert_jax.data import leftovers
leftovers.mark()
semaphore = multiprocessing.get_context("spawn").Semaphore()
memory = shared_memory.SharedMemory(create=True, size=100_000)
folder = leftovers.folder()
print(memory.name, folder, leftovers.owner(), flush=True)
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(not leftovers.SHARED.is_dir(), reason="no /dev/shm here")


@pytest.fixture
def made(tmp_path):
    """(process, its tracker among its group; what it has made; TMPDIR)."""
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(pathlib.Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE], stdout=subprocess.PIPE, text=True, env=env,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        memory, folder, owner = process.stdout.readline().split()
        semaphores = list(leftovers.SHARED.glob(f"sem.{owner}-*"))
        assert len(semaphores) == 1
        yield process, [leftovers.SHARED / memory, pathlib.Path(folder), *semaphores]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(made, tmp_path, monkeypatch):
    process, paths = made
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    leftovers.sweep()
    assert all(path.exists() for path in paths)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert all(path.exists() for path in paths)  # also Python's own tracker was killed
    (paths[1] / "copy.npy").touch()
    leftovers.sweep()
    assert not any(path.exists() for path in paths)


def test_what_is_not_ours_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(leftovers, "SHARED", tmp_path)
    gone = leftovers.owner()[:3] + "zzzzz"  # no process has so high a number
    other = "h" + ("00" if leftovers.owner()[1:3] != "00" else "01") + "zzzzz"
    names = [f"hubert_jax-{other}-abc", f"{other}_12ab", "sem.mp-abcdefgh", "psm_12ab", "hello"]
    for name in (*names, f"{gone}_12ab", f"sem.{gone}-ab_cdefg"):
        (tmp_path / name).touch()
    leftovers.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_names_are_short_enough_for_python():
    assert len(leftovers.owner()) <= 8
    leftovers.mark()
    memory = leftovers.shared_memory.SharedMemory(create=True, size=1)
    try:
        assert leftovers.NAMES.fullmatch(memory.name) and leftovers.owner() in memory.name
    finally:
        memory.close()
        memory.unlink()
    assert leftovers.NAMES.fullmatch(pathlib.Path(places._copies()).name)
