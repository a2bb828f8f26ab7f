# SPDX-License-Identifier: Apache-2.0
"""The program in processes of its own: how soon it starts, and what its training waits for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from hubert_jax import logs
from hubert_jax.bench import pipeline

PROGRAM = (sys.executable, "-c", "from hubert_jax import cli; cli.main()")
ITERATION = "it1"
LONGEST = 600.0  # seconds that a first update may take
SECONDS_BETWEEN_LOOKS = 0.02


class Waited(NamedTuple):
    """What training said of itself: seconds of its steps, and those of them spent on waiting."""

    num_steps: int
    seconds: float
    waited: float


def help_text() -> None:
    done = subprocess.run([*PROGRAM, "--help"], check=True, capture_output=True, text=True)
    assert "hubert STAGE" in done.stdout


def first_update(config: str, workdir: epath.Path, *, cache: epath.Path) -> float:
    """Seconds from the start of a training's process until its first update is made.

    Then it is interrupted, and saves: called again, it goes on, as a second start does. `cache` is
    where programs are kept once compiled.
    """
    metrics = workdir / ITERATION / "logs" / "metrics.jsonl"
    known = _num_lines(metrics)
    started = time.perf_counter()
    with subprocess.Popen(
        # a line is written one step late, so this is the time until the second update is under way
        [*_pretrain(config, workdir), "--config.train.report_every=1"],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": os.fspath(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            while _num_lines(metrics) == known:
                seconds = time.perf_counter() - started
                if process.poll() is not None or seconds > LONGEST:
                    process.kill()
                    said, _ = process.communicate()
                    raise ValueError(f"no update after {seconds:.0f} s; training said:\n{said}")
                time.sleep(SECONDS_BETWEEN_LOOKS)
            seconds = time.perf_counter() - started
            process.send_signal(signal.SIGTERM)
            process.communicate()
        finally:
            process.kill()
    return seconds


def finished(command: Sequence[str]) -> None:
    """Runs a command. Raises ValueError with what it said last where it fails."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        last = "\n".join(run.stdout.splitlines()[-20:])
        raise ValueError(f"{' '.join(command[3:])} ended with {run.returncode} and said:\n{last}")


def waited(config: str, workdir: epath.Path, *, num_steps: int) -> Waited:
    """A training of `num_steps`, the first report of which, with the compilation, is left out."""
    every = max(1, num_steps // 10)
    flags = [f"--config.train.num_steps={num_steps}", f"--config.train.report_every={every}"]
    finished([*_pretrain(config, workdir), *flags])
    lines = logs.read_metrics(workdir / ITERATION / "logs" / "metrics.jsonl")
    reports = [line for line in lines if "train/seconds_waited_for_data" in line]
    first, rest = reports[0], reports[1:]
    steps = int(rest[-1]["step"] - first["step"])
    return Waited(
        steps,
        sum(line["train/seconds"] for line in rest),
        sum(line["train/seconds_waited_for_data"] for line in rest),
    )


def _pretrain(config: str, workdir: epath.Path) -> Sequence[str]:
    labels = os.fspath(workdir / pipeline.LABELS)
    return [
        *PROGRAM, "pretrain", f"--config={config}:{ITERATION}", f"--workdir={workdir}",
        f"--config.train.labels=('{labels}',)",
    ]  # fmt: skip


def _num_lines(path: epath.Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0
