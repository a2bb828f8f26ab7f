# SPDX-License-Identifier: Apache-2.0
"""A run that goes on with other devices: 1, then 4, 8, and 1 again."""

import itertools
import pathlib
import time
from typing import NamedTuple

import numpy as np

from tests.chaos import compare, kills
from tests.chaos.project import NUM_STEPS, XLA_FLAGS, Project

DEVICES = (1, 4, 8, 1)
# The sums of a step are added up in another order, in float32; from step to step it grows.
MAX_DIFFERENCE = 1e-4  # of the losses, relative


class Moved(NamedTuple):
    faults: list[str]
    resumed: list[int]  # the steps after which the devices were others
    loss: float  # the largest relative difference of a loss from the run on one device
    control: float  # the smallest one between two steps' losses: other batches would show
    parameters: float  # the largest difference of a parameter


def moved(project: Project) -> Moved:
    """Kills pretraining after each checkpoint but the last and goes on with other devices."""
    project.restore("pretrain")
    resumed: list[int] = []
    faults: list[str] = []
    for number, count in enumerate(DEVICES):
        newest = kills.newest_step(project.work)
        run = project.start("pretrain", XLA_FLAGS=XLA_FLAGS.format(count))
        while number < len(DEVICES) - 1 and run.process.poll() is None:
            if kills.newest_step(project.work) > newest:
                run.kill()
                break
            time.sleep(0.002)
        ran = run.wait()
        faults += kills.repeated(ran, newest, resumed)
        if ran.code not in (0, -9) or f"on {count} cpu device(s)" not in ran.output:
            faults.append(f"{count} devices: code {ran.code}:\n{ran.output}")
    if len(set(resumed)) < len(DEVICES) - 1:
        faults.append(f"went on after {resumed}: too fast to be stopped {len(DEVICES) - 1} times")
    wanted = project.after("pretrain")
    ours, theirs = (folder / "it1" / "logs" / "metrics.jsonl" for folder in (project.work, wanted))
    losses, others = losses_of(ours, resumed), losses_of(theirs, resumed)
    if losses.keys() != others.keys():
        faults.append(f"reports {sorted(losses)}, not {sorted(others)}")
    difference = max(abs(losses[key] / others[key] - 1) for key in losses.keys() & others.keys())
    train = [others[key] for key in sorted(others) if key[0] == "train"]
    control = min(abs(a / b - 1) for a, b in itertools.pairwise(train))
    if not difference < MAX_DIFFERENCE < control:
        faults.append(f"losses differ by {difference:.2g}, those of two steps by {control:.2g}")
    step = f"it1/checkpoints/{NUM_STEPS}"
    found, reference = compare.contents(project.work / step), compare.contents(wanted / step)
    parameters = max(
        float(np.abs(found[name] - reference[name]).max())
        for name in reference
        if name.startswith("params/")
    )
    return Moved([f"elastic: {x}" for x in faults], resumed, difference, control, parameters)


def losses_of(path: pathlib.Path, resumed: list[int]) -> dict[tuple[str, int], float]:
    """The masked losses of a metrics.jsonl, by (split, step)."""
    rows = compare.reports(path, resumed)
    return {key: row[f"{key[0]}/masked_loss"] for key, row in rows.items()}
