# SPDX-License-Identifier: Apache-2.0
"""One run at a time: who holds a work directory, and when a lock is stale."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from hubert_jax import cli, locks, owners
from hubert_jax.data import leftovers
from tests.tones import DEMO

HOLD = """
import sys, time
from hubert_jax import locks
with locks.held(sys.argv[1], "hubert run --workdir=W"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    """A process that holds the lock of `folder`."""
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def check_refusal_and_takeover(workdir, process_in_lock: Callable[[], int]) -> None:
    """A second run is refused with the first one's name, and a killed one is taken over."""
    first = hold(workdir)
    try:
        with pytest.raises(owners.Held) as refused, locks.held(workdir, "second"):
            pass
        for part in (f"process {first.pid}", socket.gethostname(), time.strftime("%Y-%m-%d")):
            assert part in str(refused.value)
        owner = locks.owner_of(workdir)
        assert owner is not None and owner["process"] == first.pid
    finally:
        first.kill()
        first.communicate()
    assert process_in_lock() == first.pid and locks.owner_of(workdir) is None
    with locks.held(workdir, "second"):
        assert process_in_lock() == os.getpid()


def test_a_second_run_is_refused_with_the_first_ones_name_and_a_killed_one_is_taken_over(
    tmp_path, capsys
):
    path = tmp_path / owners.NAME
    check_refusal_and_takeover(tmp_path, lambda: json.loads(path.read_text())["process"])
    assert "taken over" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stage", [*cli.CONFIG_STAGES, "import codebook", "import labels"])
def test_whatever_writes_into_a_work_directory_is_refused_while_another_run_is_there(
    stage, tmp_path, capsys
):
    argv = [*stage.split(), f"--config={DEMO}", f"--workdir={tmp_path}"]
    argv += [f"--config.corpus.train={tmp_path / 'none'}"]
    argv += ["--path=none"] if stage.startswith("import") else []
    with locks.held(tmp_path, "first"), pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 1
    assert "another run is at work here: first" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def other_host(folder, age):
    path = folder / owners.NAME
    path.write_text(json.dumps({"host": "elsewhere", "process": 1, "born": "1", "since": "then"}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_run_on_another_host_is_refused_once_it_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "HEARTBEAT", 0.01)
    other_host(tmp_path, owners.STALE - 60)
    beat = threading.Timer(0.3, os.utime, [tmp_path / owners.NAME])
    beat.start()
    started = time.monotonic()
    with (
        pytest.raises(owners.Held, match="process 1 on elsewhere since then"),
        locks.held(tmp_path, "second"),
    ):
        pass
    assert 0.2 < time.monotonic() - started < 30
    beat.join()


def test_a_run_on_another_host_counts_as_gone_once_its_heartbeat_stopped(tmp_path, capsys):
    other_host(tmp_path, owners.STALE + 60)
    with locks.held(tmp_path, "second"):
        pass
    assert "waiting" not in capsys.readouterr().out


def test_a_job_that_goes_on_on_another_node_waits_for_its_former_self(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(owners, "HEARTBEAT", 0.01)
    other_host(tmp_path, owners.STALE - 1)
    with locks.held(tmp_path, "second"):
        assert json.loads((tmp_path / owners.NAME).read_text())["process"] == os.getpid()
    assert "waiting for its heartbeat" in capsys.readouterr().out


@pytest.mark.parametrize("code", locks.NO_LINKS)
def test_a_disk_without_links_has_locks_too(tmp_path, monkeypatch, code):
    def link(*paths):
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", link)
    with locks.held(tmp_path, "first"):
        assert json.loads((tmp_path / owners.NAME).read_text())["process"] == os.getpid()
        with pytest.raises(owners.Held), locks.held(tmp_path, "second"):
            pass
    assert not any(tmp_path.iterdir())


def test_a_host_of_the_same_name_is_another_one_where_it_was_started_at_another_time(
    tmp_path, monkeypatch
):
    """A pod that was put onto another node."""
    monkeypatch.setattr(owners, "HEARTBEAT", 0.01)
    with locks.held(tmp_path, "first"):
        monkeypatch.setattr(owners, "_system", lambda: "another")
        monkeypatch.setattr(owners, "STALE", 30.0)
        with pytest.raises(owners.Held), locks.held(tmp_path, "second"):
            pass


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    lock = {"host": socket.gethostname(), "process": os.getpid(), "born": "1"}
    (tmp_path / owners.NAME).write_text(json.dumps(lock))
    with locks.held(tmp_path, "second"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}'])
def test_a_lock_that_says_nothing_is_stale_at_the_latest_after_a_while(tmp_path, text):
    path = tmp_path / owners.NAME
    path.write_text(text)
    os.utime(path, (time.time() - owners.STALE - 60,) * 2)
    with locks.held(tmp_path, "second"):
        pass


def test_the_heartbeat_goes_on_while_the_lock_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "HEARTBEAT", 0.01)
    with locks.held(tmp_path, "run"):
        path = tmp_path / owners.NAME
        os.utime(path, (0, 0))
        for _ in range(500):
            if path.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_an_error_within_gives_the_folder_back(tmp_path):
    with pytest.raises(RuntimeError), locks.held(tmp_path, "run"):
        raise RuntimeError
    assert not any(tmp_path.iterdir())


def test_what_a_run_left_that_was_killed_while_it_took_the_lock_goes(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    beside = locks._beside()
    other = beside.replace(str(leftovers.namespace()), "1")
    for process in (ended.pid, f"{ended.pid}-stale", os.getppid()):
        (tmp_path / f"{beside}{process}").touch()
    for name in (f"{owners.NAME}-elsewhere-1-1", f"{other}{ended.pid}"):
        (tmp_path / name).touch()
    with locks.held(tmp_path, "run"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{beside}{os.getppid()}",  # at it right now
        f"{owners.NAME}-elsewhere-1-1",  # who knows
        f"{other}{ended.pid}",  # in another container
    }
