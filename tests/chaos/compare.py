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

from tests.chaos.project import REPORT_EVERY

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
            stored = checkpointer.metadata(step / item).item_metadata.tree
            like = {name: np.empty(x.shape, x.dtype) for name, x in stored.items()}
            arrays = checkpointer.restore(step / item, like)
        found |= {f"{item}/{name}": array for name, array in arrays.items()}
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
    """Reports around a step that training went on after are of fewer steps: not compared."""
    ours, theirs = reports(found, resumed), reports(wanted, resumed)
    keys = sorted(ours.keys() | theirs.keys())
    return [f"{found}: {key} differs" for key in keys if ours.get(key) != theirs.get(key)]


def reports(path: pathlib.Path, resumed: Iterable[int]) -> dict[tuple[str, int], dict[str, float]]:
    """The rows of a metrics.jsonl by (split, step), but those around the steps `resumed`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {}
    for row in rows:
        step = row.pop("step")
        split = next(iter(row)).partition("/")[0]
        if split == "validation" or all(abs(r - step) > REPORT_EVERY for r in resumed):
            found[split, step] = {
                name: x for name, x in row.items() if name.partition("/")[2] not in CLOCK
            }
    assert len(found) > 3, f"{path}: {len(rows)} rows"
    return found
