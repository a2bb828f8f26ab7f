# SPDX-License-Identifier: Apache-2.0
"""Whether two work directories hold the same, byte for byte, and nothing else.

What differs between two uninterrupted runs is not compared: the clock's fields of metrics.jsonl,
TensorBoard's events (their names hold the time, and every start begins a file), and how Orbax
spreads a checkpoint over files; its arrays are compared bit by bit, and its card.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

CLOCK = ("audio_seconds_per_second", "seconds", "seconds_waited_for_data")


def differences(
    found: pathlib.Path, wanted: pathlib.Path, resumed: Iterable[int] = ()
) -> list[str]:
    """What is not as it should be, in words. `resumed`: the steps after which training went on."""
    ours, theirs = files(found), files(wanted)
    faults = [f"{name}: left over" for name in sorted(ours - theirs)]
    faults += [f"{name}: missing" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        if name.endswith("metrics.jsonl"):
            faults += different_metrics(found / name, wanted / name, set(resumed))
        elif name.endswith("/checkpoint"):
            faults += different_checkpoints(found / name, wanted / name)
        elif "events" not in name and (found / name).read_bytes() != (wanted / name).read_bytes():
            faults.append(f"{name}: differs")
    return faults


def files(folder: pathlib.Path) -> set[str]:
    """Names below a folder; a checkpoint counts as one, WORK/it1/checkpoints/40/checkpoint."""
    names = set()
    for path in folder.rglob("*"):
        parts = list(path.relative_to(folder).parts)
        if "checkpoints" in parts[:-1]:
            step = parts.index("checkpoints") + 1
            if len(parts) > step + 1 or path.is_dir():
                parts = [*parts[: step + 1], "checkpoint"]
        elif path.is_dir() and any(path.iterdir()):
            continue
        if parts[-1].startswith("events.out.tfevents"):
            parts[-1] = "events"
        names.add("/".join(parts))
    return names


def different_checkpoints(found: pathlib.Path, wanted: pathlib.Path) -> list[str]:
    ours, theirs = contents(found.parent), contents(wanted.parent)
    names = [name for name in sorted(ours | theirs) if not same(ours.get(name), theirs.get(name))]
    return [f"{found.parent}: {name} differs" for name in names]


def contents(step: pathlib.Path) -> dict[str, Any]:
    """The arrays of both items and the card, by name."""
    found: dict[str, Any] = {"card": json.loads((step / "card" / "metadata").read_text())}
    for item in ("params", "optimizer"):
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(step / item)
        found |= {f"{item}/{name}": np.asarray(array) for name, array in arrays.items()}
    return found


def same(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, np.ndarray) or not isinstance(theirs, np.ndarray):
        return ours == theirs
    return (ours.dtype, ours.shape, ours.tobytes()) == (
        theirs.dtype,
        theirs.shape,
        theirs.tobytes(),
    )


def different_metrics(found: pathlib.Path, wanted: pathlib.Path, resumed: set[int]) -> list[str]:
    """The first report after going on is the mean over fewer steps: only its step is compared."""
    ours, theirs = without_clock(found), without_clock(wanted)
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        return [f"{found}: reports steps {[row['step'] for row in ours]}"]
    reports = [row["step"] for row in ours if "train/loss" in row]
    first = {min((step for step in reports if step > start), default=0) for start in resumed}
    return [
        f"{found}: step {row['step']} differs"
        for row, other in zip(ours, theirs, strict=True)
        if row != other and not ("train/loss" in row and row["step"] in first)
    ]


def without_clock(path: pathlib.Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: x for name, x in row.items() if name.removeprefix("train/") not in CLOCK}
        for row in rows
    ]
