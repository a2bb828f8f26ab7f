# SPDX-License-Identifier: Apache-2.0
"""What a run says: lines and progress bars for people, metrics.jsonl and TensorBoard for plots.

Bars are drawn on a terminal; where there is none (a log file, a cluster), a line every ten seconds
says the same.
"""

import contextlib
import json
import math
import pathlib
import shutil
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import tqdm
from etils import epath

from hubert_jax.data import cards, leftovers, places

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FLUSHES = 30.0  # of TensorBoard's events
SECONDS_BETWEEN_UPLOADS = 60.0  # of metrics in a bucket
_is_silent = False  # this process, of several that do the same


def silence() -> None:
    """No more lines and bars from this process: another one of the run says the same."""
    global _is_silent
    _is_silent = True


def info(message: str) -> None:
    """Prints `message` on stdout, above any bar; without a terminal, after the time of day."""
    if _is_silent:
        return
    if not sys.stdout.isatty():
        message = f"{time.strftime('%H:%M:%S')} {message}"
    tqdm.tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """How far a long loop is, how fast it goes and how long it still takes.

        with logs.Progress("label train", total=3600.0, unit="s of audio") as progress:
            for seconds in work:
                progress.advance(seconds)

    `total` is in `unit`; None where it is not known. `done` was there before (a run that goes on):
    it counts as progress and not in the rate. `note` is shown until the next one.
    """

    def __init__(
        self, title: str, total: float | None, unit: str = "s of audio", *, done: float = 0.0
    ):
        self.title, self.total, self.unit = title, total, unit
        self.count = self._count_before = done
        self._note = ""
        self._bar: tqdm.tqdm | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if sys.stderr.isatty() and not _is_silent:
            share = "" if self.total is None else "{percentage:3.0f}%|{bar}| "
            total = "" if self.total is None else "/{total:.0f}"
            left = "" if self.total is None else "<{remaining}"
            self._bar = tqdm.tqdm(
                desc=self.title,
                total=self.total,
                initial=self.count,
                unit=f" {self.unit}",
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{desc}: "
                + share
                + "{n:.0f}"
                + total
                + "{unit} [{elapsed}"
                + left
                + ", {rate_noinv_fmt}]{postfix}",
            )
        return self

    def advance(self, amount: float, *, note: str | None = None) -> None:
        """Counts `amount` more units as done."""
        self.count += amount
        if note is not None:
            self._note = note
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            info(self._line())

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error_type is None:
            info(self._line())

    def _line(self) -> str:
        elapsed = time.monotonic() - self._start
        rate = (self.count - self._count_before) / max(elapsed, 1e-9)
        parts = [f"{self.title}: {self.count:.0f}"]
        if self.total is not None:
            share = 100 * self.count / self.total if self.total else 100.0
            parts[0] += f" of {self.total:.0f} {self.unit} ({share:.0f} %)"
        else:
            parts[0] += f" {self.unit}"
        parts += [f"{rate:.4g} {self.unit}/s", f"{clock(elapsed)} gone"]
        if self.total is not None and self.count < self.total and rate > 0:
            parts.append(f"{clock((self.total - self.count) / rate)} left")
        if self._note:
            parts.append(self._note)
        return ", ".join(parts)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown with aligned columns; the first line is the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[x.ljust(width) for x, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def clock(seconds: float) -> str:
    """Seconds as people read them: '0:07', '3:05', '2:03:05'."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{whole_seconds:02d}"
    return f"{minutes}:{whole_seconds:02d}"


def metrics(folder, *, resume_from: int, is_kept: bool) -> "Metrics":
    """The metrics of a run; of several processes only one keeps them, in the others they vanish."""
    return Metrics(folder, resume_from=resume_from) if is_kept else _NoMetrics()


class Metrics:
    """The numbers of a training run: one line of metrics.jsonl per write, and TensorBoard events.

    A run that goes on from a checkpoint repeats the steps after it, so lines of steps beyond
    `resume_from` (0 for a new run) are dropped here and hidden in TensorBoard.
    """

    def __init__(self, folder, *, resume_from: int):
        self._bucket = None if places.is_local(folder) else epath.Path(folder)
        self._scratch = leftovers.folder() if self._bucket else None
        self.path = pathlib.Path(self._scratch or folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._bucket and (self._bucket / self.path.name).exists():
            self.path.write_bytes((self._bucket / self.path.name).read_bytes())
        if self.path.exists():
            _drop_lines_after(self.path, resume_from)
        self._lines = self.path.open("a", encoding="utf-8")
        self._events = _Events(self.path.parent, first_step=resume_from + 1)
        self._last_upload = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` after `step` steps. Names with a slash group the plots: 'train/loss'."""
        floats = {name: float(value) for name, value in values.items()}
        with cards.enough_space(self.path):
            self._lines.write(json.dumps({"step": int(step), **floats}) + "\n")
            self._lines.flush()
        with cards.enough_space(self.path.parent):
            self._events.write(int(step), floats)
        if time.monotonic() - self._last_upload > SECONDS_BETWEEN_UPLOADS:
            self._upload()

    def close(self) -> None:
        with cards.enough_space(self.path.parent):
            self._lines.close()
            self._events.close()
        self._upload()
        if self._scratch:
            shutil.rmtree(self._scratch)

    def _upload(self) -> None:
        """Nothing can be appended to a file in a bucket: all of it is written again."""
        self._last_upload = time.monotonic()
        if self._bucket:
            places.upload(self.path.parent, self._bucket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _Events:
    """A file for TensorBoard, written by the caller.

    tensorboardX' own writer has a thread, which a full disk ends: nobody is told, and once the
    queue to it is full training waits for ever.
    """

    def __init__(self, folder: pathlib.Path, *, first_step: int):
        with _hidden("torch"):  # which it loads where there is one, two seconds for nothing
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # Steps from here on, of a run that was stopped, are hidden.
        self._file.write_event(self._event(step=first_step, session_log=start))
        self._last_flush = -math.inf

    def write(self, step: int, floats: Mapping[str, float]) -> None:
        for name, value in floats.items():
            event = self._event(step=step, wall_time=time.time(), summary=self._scalar(name, value))
            self._file.write_event(event)
        if time.monotonic() - self._last_flush > SECONDS_BETWEEN_FLUSHES:
            self._last_flush = time.monotonic()
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class _NoMetrics(Metrics):
    def __init__(self) -> None:
        pass

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without a last one that a kill has cut short."""
    try:
        lines = epath.Path(path).read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise ValueError("a line without its step")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not the metrics of a run ({error}); move it away: training does not need it"
        ) from error
    return rows


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Within, `package` cannot be imported; where it was loaded before, it stays as it is."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with cards.whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
