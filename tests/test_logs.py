# SPDX-License-Identifier: Apache-2.0
"""Progress without a terminal, and metrics that a restarted run does not repeat."""

import errno
import struct
import subprocess
import sys
import tempfile

import pytest

from hubert_jax import logs


def test_progress_without_a_terminal_prints_lines(capsys, monkeypatch):
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", 0.0)
    with logs.Progress("label train", total=10.0, done=2.0) as progress:
        progress.advance(3.0)
        progress.advance(5.0, note="loss 4.61")
    halfway, last, end = capsys.readouterr().out.splitlines()
    assert "label train: 5 of 10 s of audio (50 %)" in halfway and "left" in halfway
    assert "(100 %)" in last and "left" not in last and last.endswith("loss 4.61")
    assert "label train: 10 of 10" in end


def test_progress_is_silent_about_the_end_of_a_failure(capsys):
    try:
        with logs.Progress("x", total=None, unit="files") as progress:
            progress.advance(1)
            raise ValueError("broken")
    except ValueError:
        assert capsys.readouterr().out == ""


def test_progress_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with logs.Progress("prepare", total=4.0) as progress:
        progress.advance(4.0)
    captured = capsys.readouterr()
    assert "prepare: 100%|" in captured.err and "4/4 s of audio" in captured.err
    assert captured.out == ""


def test_clock():
    assert [logs.clock(s) for s in (7.4, 185, 7385)] == ["0:07", "3:05", "2:03:05"]


def test_metrics_drop_the_steps_that_a_resumed_run_repeats(tmp_path):
    with logs.Metrics(tmp_path, resume_from=0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"train/loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "train/lo')  # the line of a killed run
    with logs.Metrics(tmp_path, resume_from=2) as metrics:
        metrics.write(3, {"train/loss": 30})
    assert logs.read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": 30.0},
    ]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) >= 1


def test_a_progress_bar_costs_no_plotting_library():
    program = "import sys; from hubert_jax import logs; print('tensorboardX' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert result.stdout.strip() == b"False"


def test_tensorboard_does_not_bring_torch(tmp_path):
    """Two seconds of every start of a training where torch is installed."""
    program = (
        "import sys; from hubert_jax import logs;"
        f"logs.Metrics({str(tmp_path)!r}, resume_from=0).write(1, {{'loss': 1.0}});"
        "print('torch' in sys.modules, 'tensorboardX' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert done.stdout.split() == ["False", "True"]


def test_metrics_on_a_local_disk_need_no_temporary_folder(tmp_path, monkeypatch):
    """A killed run would leave it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with logs.Metrics(tmp_path / "logs", resume_from=0):
        assert not any((tmp_path / "temporary").iterdir())


def events_of(folder):
    """The events of the TensorBoard files in a folder, the oldest file first."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])  # and a checksum of 4 bytes on either side
            events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_tensorboard_is_told_where_a_run_went_on(tmp_path):
    with logs.Metrics(tmp_path, resume_from=7) as metrics:
        metrics.write(8, {"train/loss": 2.5})
    version, start, event = events_of(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == start.session_log.START and start.step == 8
    (value,) = event.summary.value
    assert (event.step, value.tag, value.simple_value) == (8, "train/loss", 2.5)


def test_a_full_disk_ends_a_run_in_words_whichever_file_it_meets(tmp_path, monkeypatch):
    """tensorboardX' own writer would stop quietly, and then hold the run up for ever."""
    for part in ("_lines", "_events"):
        metrics = logs.Metrics(tmp_path / part, resume_from=0)
        metrics.write(1, {"train/loss": 1.0})

        def write(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with metrics, monkeypatch.context() as patched:
            patched.setattr(getattr(metrics, part), "write", write, raising=False)
            with pytest.raises(OSError, match=f"no space left writing {tmp_path / part}"):
                metrics.write(2, {"train/loss": 1.0})
