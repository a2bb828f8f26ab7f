# SPDX-License-Identifier: Apache-2.0
"""Work directories that something else is at work in, that are of another version, or edited."""

import json
import pathlib
import shutil
import signal
import socket
import time
from typing import Any

from tests import tones
from tests.chaos import compare, disks, kills
from tests.chaos.project import NUM_STEPS, Project

LAST = f"it1/checkpoints/{NUM_STEPS}/card/metadata"  # the card of the last checkpoint
# (stage, a card as it is before it, field, value, what must be refused and named)
EDITS = (
    ("features", "corpus/card.json", "made_from.corpus.min_seconds", 0.25, "corpus.min_seconds is"),
    ("features", "corpus/card.json", "sample_rate", 8000, "sample_rate is 8000"),
    ("cluster", "it1/features/card.json", "source.kind", "layer", "source.kind is 'layer'"),
    ("cluster", "it1/features/card.json", "made_from.sample_share", 0.5, "sample_share is 0.5"),
    ("cluster", "it1/features/card.json", "dtype", "float16", "float32, the index says"),
    ("cluster", "it1/features/card.json", "width", 13, "39) float32, the index says"),
    ("label", "it1/codebook.json", "num_codes", 7, "num_codes is 7"),
    ("label", "it1/codebook.json", "source.kind", "layer", "source.kind is 'layer'"),
    ("label", "it1/codebook.json", "digest", "sha256:0", "is not the codebook of codebook.json"),
    ("pretrain", "corpus/card.json", "fingerprint", "sha256:0", "expected 'sha256:0'"),
    ("pretrain", "it1/labels/train/card.json", "corpus", "sha256:0", "corpus is 'sha256:0'"),
    ("pretrain", "it1/labels/train/card.json", "codebook", "sha256:0", "codebook is"),
    ("pretrain", "it1/labels/train/card.json", "num_codes", 7, "num_codes is 7"),
    ("pretrain", "it1/labels/train/card.json", "num_codes", 101, "num_codes is 101"),
    ("pretrain", "it1/labels/validation/card.json", "rate", 50, "rate"),
    ("pretrain", "it1/labels/train/card.json", "kind", "features", "kind is 'features'"),
    ("features of a layer", "it1/checkpoints/card.json", "made_from.optim.peak_lr", 1.0, "peak_lr"),
    ("features of a layer", LAST, "model.num_heads", 2, "model.num_heads is 2"),
    ("features of a layer", LAST, "model.pre_norm", False, "model.pre_norm is False"),
    ("cluster of a layer", "it2/features/card.json", "source.layer", 1, "source.layer is 1"),
    (
        "label by a layer",
        "it2/codebook.json",
        "source.checkpoint.step",
        10,
        "checkpoint.step is 10",
    ),
    ("export units", "it2/codebook.json", "source.layer", 1, "source.layer is 1"),
    ("export units", "it2/codebook.json", "source.checkpoint.encoder", "sha256:0", "sha256:0"),
    ("export units", LAST, "model.num_heads", 2, "model.num_heads is 2"),
)
# Who else reads a card again: whoever made it.
READER = {"made_from.corpus.min_seconds": "prepare", "made_from.optim.peak_lr": "pretrain"}
# (a stage that reads it, a card)
CARDS = (
    ("features", "corpus/card.json"),
    ("cluster", "it1/features/card.json"),
    ("label", "it1/codebook.json"),
    ("pretrain", "it1/labels/train/card.json"),
    ("features of a layer", LAST),
)


def two_runs(project: Project) -> tuple[list[str], list[str]]:
    """What was lost of (a second run's refusal, taking over from a first run that was killed)."""
    name = "pretrain"
    project.restore(name)
    project.stages["run"] = [
        "run", f"--config={tones.DEMO}", *project.stages[name][2:], "--config.iterations=('it1',)",
    ]  # fmt: skip
    first = project.start("run")
    while kills.newest_step(project.work) == 0 and first.process.poll() is None:
        time.sleep(0.01)
    first.process.send_signal(signal.SIGSTOP)  # it is there for as long as it takes
    refused = []
    for stage in ("run", "pretrain", "prepare"):
        second = project.run(stage)
        for part in (str(first.process.pid), socket.gethostname(), time.strftime("%Y-%m-%d")):
            if f" {part}" not in second.error:
                refused.append(f"{stage}, second: code {second.code}:\n{second.output}")
                break
    first.kill()
    first.wait()
    newest, resumed = kills.newest_step(project.work), []
    again = project.run("run")
    taken = kills.repeated(again, newest, resumed)
    if again.code or "taken over" not in again.output:
        taken.append(f"code {again.code}:\n{again.output}")
    taken += compare.differences(project.work, project.after(name), resumed)
    del project.stages["run"]
    return refused, [f"the first run killed, then again: {fault}" for fault in taken]


def edited(project: Project, stage: str, name: str, field: str, value: Any, said: str) -> list[str]:
    """A field changed by hand: refused by name, or what was lost."""
    project.restore(stage)
    path = project.work / name
    change(path, field, value)
    ran = project.run(READER.get(field, stage))
    faults = []
    if said not in ran.error or str(project.work) not in ran.error:
        faults.append(f"code {ran.code}:\n{ran.error or ran.output}")
    shutil.copyfile(project.base / "before" / stage / name, path)
    faults += disks.completed(project, stage)
    return [f"{stage}, {name}: {field} edited: {fault}" for fault in faults]


def of_before(project: Project, stage: str) -> list[str]:
    """Cards as 0.1.0 wrote them, without checksums of arrays and a format: read as they are."""
    project.restore(stage)
    for path in project.work.rglob("*.json"):
        change(path, "format", None)
    for path in project.work.glob("it1/checkpoints/*/card/metadata"):
        for field in ("format", "checksums", "kept"):
            change(path, field, None)
    before = {path: path.read_bytes() for path in project.work.rglob("*") if path.is_file()}
    ran = project.run(stage)
    if ran.code:
        return [f"{stage}, cards of before: code {ran.code}:\n{ran.output}"]
    changed = [path for path, contents in before.items() if path.read_bytes() != contents]
    faults = [f"{stage}, cards of before: {path} changed" for path in changed]
    for path in before:  # now what is compared is what is new
        shutil.copyfile(project.base / "before" / stage / path.relative_to(project.work), path)
    return faults + compare.differences(project.work, project.after(stage))


def of_later(project: Project, stage: str, name: str) -> list[str]:
    """A card of a format that is not known yet: refused, with the version that wrote it."""
    project.restore(stage)
    path = project.work / name
    change(path, "format", 99)
    change(path, "versions.hubert_jax", "7.0.0")
    ran = project.run(stage)
    is_refused = "7.0.0" in ran.error and str(path.parent) in ran.error
    return [] if is_refused else [f"{stage}, {name} of later: code {ran.code}:\n{ran.output}"]


def change(path: pathlib.Path, field: str, value: Any) -> None:
    """Sets a dotted field of a JSON file; None takes it out."""
    card = json.loads(path.read_text())
    *outer, last = field.split(".")
    place = card
    for part in outer:
        place = place[part]
    if value is None:
        place.pop(last, None)
    else:
        assert last in ("format", *place) and place.get(last) != value, f"{path}: {field}"
        place[last] = value
    path.write_text(json.dumps(card))
