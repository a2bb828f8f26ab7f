# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a bucket: tensorstore's own gs:// driver, and behind it tests/gcs.py."""

import json
import os
import threading
import time

import pytest

from hubert_jax import cli, locks, owners
from hubert_jax.bucket_locks import Bucket
from tests import gcs
from tests.test_locks import check_refusal_and_takeover
from tests.tones import DEMO

WORK = "gs://bucket/work"
LOCK = "work/.running"
ELSEWHERE = {"host": "elsewhere", "process": 1, "born": "1", "since": "then"}


@pytest.fixture(scope="module")
def server():
    """Of the whole module: tensorstore looks at its variables once."""
    with gcs.bucket() as (environment, objects), pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        yield objects


@pytest.fixture
def objects(server):
    server.clear()
    gcs.Handler.lose_answers = 0
    return server


def test_a_second_run_is_refused_and_a_killed_one_is_taken_over(objects):
    check_refusal_and_takeover(WORK, lambda: json.loads(objects[LOCK][1])["process"])
    assert not objects


def test_of_runs_that_start_together_one_gets_it(objects):
    """Sixteen, all of which look before the first one writes."""
    together = threading.Barrier(16)
    read, got, refused = Bucket.read, [], []

    def read_together(bucket):
        found = read(bucket)
        if found[0] is None:
            together.wait()
        return found

    def run(n: int) -> None:
        try:
            with locks.held(WORK, f"run {n}"):
                got.append(n)
                ended.wait()
        except owners.Held:
            refused.append(n)
            if len(refused) == 15:
                ended.set()

    ended = threading.Event()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Bucket, "read", read_together)
        runs = [threading.Thread(target=run, args=[n]) for n in range(16)]
        for one in runs:
            one.start()
        for one in runs:
            one.join(60)
    assert len(got) == 1 and len(refused) == 15
    assert not objects


@pytest.mark.parametrize("stage", ["run", "prepare", "pretrain", "import codebook"])
def test_a_command_is_refused_while_another_run_is_there(stage, objects, capsys):
    argv = [*stage.split(), f"--config={DEMO}", f"--workdir={WORK}"]
    argv += ["--path=none"] if stage.startswith("import") else []
    with locks.held(WORK, "first"), pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 1
    assert "another run is at work here: first" in capsys.readouterr().err
    assert not os.path.exists("gs:")


def other_host(age: float) -> None:
    """Its heartbeat, `age` seconds ago by its own clock."""
    bucket = Bucket(WORK)
    text = json.dumps(ELSEWHERE | {"beat": time.time() - age})
    assert bucket._replace(text, bucket.read()[1])


def test_a_run_on_another_host_is_refused_once_it_is_heard(objects, monkeypatch):
    monkeypatch.setattr(owners, "HEARTBEAT", 0.1)
    other_host(age=30.0)
    beat = threading.Timer(0.3, other_host, [0.0])
    beat.start()
    with (
        pytest.raises(owners.Held, match="process 1 on elsewhere since then"),
        locks.held(WORK, "second"),
    ):
        pass
    beat.join()
    assert json.loads(objects[LOCK][1])["host"] == "elsewhere"


def test_an_old_lock_is_looked_at_for_two_heartbeats_before_it_is_taken(objects, monkeypatch):
    """Its host's clock may be slow."""
    monkeypatch.setattr(owners, "HEARTBEAT", 0.1)
    other_host(age=2 * owners.STALE)
    began = time.monotonic()
    with locks.held(WORK, "second"):
        assert json.loads(objects[LOCK][1])["process"] == os.getpid()
    assert time.monotonic() - began > 0.2
    other_host(age=2 * owners.STALE)
    monkeypatch.setattr(owners, "HEARTBEAT", 2.0)
    beat = threading.Timer(0.1, other_host, [2 * owners.STALE])
    beat.start()
    with pytest.raises(owners.Held), locks.held(WORK, "second"):
        pass
    beat.join()


def test_a_lock_that_goes_while_it_is_waited_for_is_free(objects, monkeypatch):
    monkeypatch.setattr(owners, "HEARTBEAT", 0.1)
    other_host(age=1.0)
    threading.Timer(0.3, objects.clear).start()
    with locks.held(WORK, "second"):
        assert json.loads(objects[LOCK][1])["process"] == os.getpid()


def test_the_heartbeat_writes_and_a_lock_that_was_taken_is_left_alone(objects, monkeypatch, capsys):
    monkeypatch.setattr(owners, "HEARTBEAT", 0.05)
    with locks.held(WORK, "first"):
        first, _ = objects[LOCK]
        wait_until(lambda: objects[LOCK][0] > first)
        while not Bucket(WORK).write(ELSEWHERE, replaces=Bucket(WORK).read()[1]):
            pass  # a heartbeat came between
        wait_until(lambda: "another's by now" in capsys.readouterr().out)
    assert json.loads(objects[LOCK][1])["host"] == "elsewhere"


def test_a_write_whose_answer_is_lost_was_written(objects, monkeypatch, capsys):
    """tensorstore tries again, and is refused because of itself."""
    monkeypatch.setattr(owners, "HEARTBEAT", 0.05)
    gcs.Handler.lose_answers = 1
    with locks.held(WORK, "first"):
        first, _ = objects[LOCK]
        gcs.Handler.lose_answers = 1
        wait_until(lambda: not gcs.Handler.lose_answers)
        lost, _ = objects[LOCK]
        wait_until(lambda: objects[LOCK][0] > lost > first)
    assert not objects and "another's" not in capsys.readouterr().out


def wait_until(is_so) -> None:
    for _ in range(3_000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"host": 3}'])
def test_a_lock_that_says_nothing_is_taken_over(objects, monkeypatch, text):
    monkeypatch.setattr(owners, "HEARTBEAT", 0.05)
    objects[LOCK] = 7, text
    with locks.held(WORK, "second"):
        assert json.loads(objects[LOCK][1])["process"] == os.getpid()
    assert not objects


def test_a_bucket_that_cannot_be_reached_is_an_error_that_names_it():
    with (
        pytest.raises(OSError, match=r"nowhere://bucket/work: the lock .* credentials"),
        locks.held("nowhere://bucket/work", "run"),
    ):
        pass
