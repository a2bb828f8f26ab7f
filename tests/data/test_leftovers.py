# SPDX-License-Identifier: Apache-2.0
"""Nothing is left of a process that was killed with all its children, once another one starts."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from multiprocessing import shared_memory

import pytest

from hubert_jax import cli
from hubert_jax.data import leftovers, places

MAKE = """
import multiprocessing, time
from multiprocessing import shared_memory
from hubert_jax.data import leftovers
leftovers.sign()
semaphore = multiprocessing.get_context("spawn").Semaphore()
memory = shared_memory.SharedMemory(create=True, size=100_000)
folder = leftovers.folder()
print(memory.name, folder, leftovers.mark(), flush=True)
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
        memory, folder, mark = process.stdout.readline().split()
        semaphores = list(leftovers.SHARED.glob(f"sem.{mark}-*"))
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
    process.wait()  # so is Python's own tracker, which would tidy up
    assert paths[1].exists()
    (paths[1] / "copy.npy").touch()
    leftovers.sweep()
    assert not any(path.exists() for path in paths)


def test_what_is_not_ours_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(leftovers, "SHARED", tmp_path)
    gone = leftovers.mark()[:3] + "zzzzz"  # no process has so high a number
    other = "h" + ("00" if leftovers.mark()[1:3] != "00" else "01") + "zzzzz"
    host, other_host = leftovers._host(), "0" * 16
    names = [
        f"{other}_12ab", "sem.mp-abcdefgh", "psm_12ab", "hello", f"{gone}_data", f"{gone}-12ab",
        f"hubert_jax-{host}-{other}-abc", f"hubert_jax-{other_host}-{gone}-abc", "hubert_jax-work",
    ]  # fmt: skip
    ours = [f"{gone}_12ab", f"sem.{gone}-ab_cdefg", f"hubert_jax-{host}-{gone}-ab_cdefg"]
    for name in (*names, *ours):
        if name.startswith("hubert_jax"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).touch()
    leftovers.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {
        *names[:6],
        names[7],
        "hubert_jax-work",
    }  # of one host and namespace, another mark cannot be


def test_names_are_short_enough_for_python(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 2**22 - 1)  # the highest there is
    assert len(leftovers.mark()) == 8
    leftovers.sign()
    memory = shared_memory.SharedMemory(create=True, size=1)
    try:
        assert leftovers.IN_SHARED.fullmatch(memory.name) and leftovers.mark() in memory.name
    finally:
        memory.close()
        with contextlib.suppress(FileNotFoundError):  # no process has this number: swept
            memory.unlink()
        monkeypatch.undo()
        leftovers.sign()
    assert leftovers.FOLDER.fullmatch(pathlib.Path(places._copies()).name)


def test_a_command_sweeps_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    left = tmp_path / f"hubert_jax-{leftovers._host()}-{leftovers.mark()[:3]}zzzzz-abcdefgh"
    left.mkdir()
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert not left.exists()


def test_without_a_temporary_folder_there_is_nothing_to_sweep(monkeypatch):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    leftovers.sweep()
    leftovers.remove_folders()
