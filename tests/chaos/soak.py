# SPDX-License-Identifier: Apache-2.0
"""An hour of pretraining at the demo's size: does it take more memory, files or time as it goes on?

    make soak                                 # 60 minutes
    python -m tests.chaos.soak --minutes=3

`launch/local.sh pretrain` is watched from outside, through /proc, ended by SIGTERM and judged: ten
minutes after a quarter of the time, which is the warm-up, against the last ten.
"""

import argparse
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from hubert_jax import logs

DEMO = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"
LOCAL = DEMO.parents[1] / "launch" / "local.sh"
PATH = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PATH": PATH}
SIZES = (
    "corpus.synth.train_minutes=3.0", "corpus.synth.validation_minutes=1.0",
    "kmeans.seed_rows=5_000", "kmeans.num_restarts=1",
    "train.num_steps=100_000_000", "train.report_every=20", "train.validate_every=500",
    "checkpoints.every=500",
)  # fmt: skip
MAX_GROWTH_OF_MEMORY = 0.10  # saves and validation make it go up and down by as much
MAX_GROWTH_OF_CPU_SECONDS = 0.10


class Sample(NamedTuple):
    """What /proc and metrics.jsonl say of the run at one moment."""

    seconds: float  # since the first step
    step: int
    memory_mb: float  # of its own, in memory or swapped out: the rest is pages of files
    resident_mb: float
    peak_mb: float
    num_files: int
    num_threads: int
    cpu_seconds: float


class Stretch(NamedTuple):
    """Ten minutes of a run. Files and threads at the fewest: a save has some for its while."""

    steps: int
    memory_mb: float  # median
    resident_mb: float  # median
    num_files: int
    num_threads: int
    cpu_seconds_per_step: float
    wall_seconds_per_step: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as workdir:
        for stage in ("prepare", "features", "cluster", "label"):
            subprocess.run(command(stage, workdir), check=True, env=ENVIRONMENT)
        samples, faults = watch(pathlib.Path(workdir), 60 * args.minutes)
    stretch = min(600.0, 20 * args.minutes)
    start = 15 * args.minutes  # the warm-up is a quarter
    end = samples[-1].seconds
    first = of(within(samples, start, start + stretch))
    last = of(within(samples, end - stretch, end))
    peak, steps = samples[-1].peak_mb, samples[-1].step
    print(
        f"\n{steps} steps in {end / 60:.1f} minutes, {len(samples)} samples, peak {peak:.0f} MB\n"
    )
    print(table(first, last, stretch / 60))
    faults += judged(first, last)
    print("\n" + ("\n".join(faults) or "flat"))
    sys.exit(1 if faults else 0)


def command(stage: str, workdir: str | os.PathLike) -> list[str]:
    options = [f"--config={DEMO}:it1", f"--workdir={workdir}"]
    return [str(LOCAL), stage, *options, *(f"--config.{field}" for field in SIZES)]


def watch(workdir: pathlib.Path, seconds: float) -> tuple[list[Sample], list[str]]:
    """Samples of a run that is ended after some time, and what was wrong with its end."""
    metrics = workdir / "it1" / "logs" / "metrics.jsonl"
    log = workdir / "log.txt"
    with log.open("w") as file:
        run = subprocess.Popen(
            command("pretrain", workdir), stdout=file, stderr=file, env=ENVIRONMENT
        )
    samples: list[Sample] = []
    began = None
    try:
        while began is None or time.monotonic() - began < seconds:
            if run.poll() is not None:
                raise RuntimeError(
                    f"the run ended by itself ({run.returncode}):\n{log.read_text()}"
                )
            if began is None:
                began = time.monotonic() if metrics.exists() and metrics.stat().st_size else None
                time.sleep(1)
                continue
            samples.append(sample(run.pid, metrics, time.monotonic() - began))
            print(
                *(f"{name} {value:.6g}" for name, value in samples[-1]._asdict().items()), sep=", "
            )
            sys.stdout.flush()
            time.sleep(min(30.0, seconds / 20))
        signalled = time.monotonic()
        run.send_signal(signal.SIGTERM)
        code = run.wait(timeout=120)
    finally:
        run.kill()
        run.wait()
    print(f"SIGTERM: exit code {code} after {time.monotonic() - signalled:.1f} s")
    found = re.search(r"stopped by SIGTERM after step (\d+); it is saved", log.read_text())
    faults = [] if code == 130 else [f"exit code {code}, not 130:\n{log.read_text()[-2000:]}"]
    if not found or not (workdir / "it1" / "checkpoints" / found[1] / "params").exists():
        faults.append(f"no checkpoint of the last step:\n{log.read_text()[-2000:]}")
    return samples, faults


def sample(process: int, metrics: pathlib.Path, seconds: float) -> Sample:
    folder = pathlib.Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())

    def megabytes(field: str) -> float:
        return int(status[field].split()[0]) / 1024

    ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]  # utime, stime
    return Sample(
        seconds=seconds,
        step=logs.read_metrics(metrics)[-1]["step"],
        memory_mb=megabytes("RssAnon") + megabytes("VmSwap"),
        resident_mb=megabytes("VmRSS"),
        peak_mb=megabytes("VmHWM"),
        num_files=len(list((folder / "fd").iterdir())),
        num_threads=int(status["Threads"]),
        cpu_seconds=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    )


def within(samples: Sequence[Sample], start: float, stop: float) -> list[Sample]:
    return [sample for sample in samples if start <= sample.seconds <= stop]


def of(samples: Sequence[Sample]) -> Stretch:
    steps = samples[-1].step - samples[0].step
    return Stretch(
        steps=steps,
        memory_mb=statistics.median(s.memory_mb for s in samples),
        resident_mb=statistics.median(s.resident_mb for s in samples),
        num_files=min(s.num_files for s in samples),
        num_threads=min(s.num_threads for s in samples),
        cpu_seconds_per_step=(samples[-1].cpu_seconds - samples[0].cpu_seconds) / steps,
        wall_seconds_per_step=(samples[-1].seconds - samples[0].seconds) / steps,
    )


def table(first: Stretch, last: Stretch, minutes: float) -> str:
    lines = [
        ["", f"{minutes:.2g} minutes after a quarter", f"last {minutes:.2g} minutes"],
        ["steps", *(str(x.steps) for x in (first, last))],
        ["memory of its own, median MB", *(f"{x.memory_mb:.1f}" for x in (first, last))],
        [
            "resident, with files' pages, median MB",
            *(f"{x.resident_mb:.1f}" for x in (first, last)),
        ],
        ["open files, fewest", *(str(x.num_files) for x in (first, last))],
        ["threads, fewest", *(str(x.num_threads) for x in (first, last))],
        ["CPU ms a step", *(f"{1e3 * x.cpu_seconds_per_step:.2f}" for x in (first, last))],
        ["wall ms a step", *(f"{1e3 * x.wall_seconds_per_step:.2f}" for x in (first, last))],
    ]
    return logs.table(lines)


def judged(first: Stretch, last: Stretch) -> list[str]:
    """What grew. Wall time is not judged: other work may share the machine."""
    faults = []
    if last.memory_mb > (1 + MAX_GROWTH_OF_MEMORY) * first.memory_mb:
        faults.append(f"memory grew from {first.memory_mb:.1f} to {last.memory_mb:.1f} MB")
    if last.num_files > first.num_files:
        faults.append(f"open files grew from {first.num_files} to {last.num_files}")
    if last.num_threads > first.num_threads:
        faults.append(f"threads grew from {first.num_threads} to {last.num_threads}")
    if last.cpu_seconds_per_step > (1 + MAX_GROWTH_OF_CPU_SECONDS) * first.cpu_seconds_per_step:
        faults.append(
            f"CPU seconds a step grew from {first.cpu_seconds_per_step:.4f} to"
            f" {last.cpu_seconds_per_step:.4f}"
        )
    return faults


if __name__ == "__main__":
    main()
