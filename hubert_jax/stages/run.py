# SPDX-License-Identifier: Apache-2.0
"""hubert run: the whole way, every stage of every iteration of a config.

What is done is skipped, so it can be stopped and started again. First prepare, then for each of
config.iterations features, cluster, label, and pretrain if that iteration trains. What is
overridden on the command line is so for all of them.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from hubert_jax import logs
from hubert_jax.data import cards

SCORES = {"pnmi": " PNMI", "phone_purity": "phone purity", "cluster_purity": "cluster purity"}


def run(get_config: Callable[[str], Any], workdir: epath.Path) -> None:
    """Runs the pipeline; `get_config(iteration)` gives a ConfigDict, '' being the first one.

    A failure leaves everything that was finished before it in place.
    """
    started = time.monotonic()
    first = get_config("")
    configs = [get_config(name) for name in first.iterations]  # all built before any hour is spent
    walk("prepare", first, workdir, place="[prepare]")
    for config in configs:
        arrows = arrows_of(config, workdir)
        for number, stage in enumerate(arrows, start=1):
            place = f"[{config.iteration} {number}/{len(arrows)}] {stage}"
            walk(stage, config, workdir, place=place)
    logs.info(f"done in {logs.clock(time.monotonic() - started)}\n" + outputs(configs, workdir))
    logs.info(score_table(configs, workdir))


def arrows_of(config, workdir: epath.Path) -> list[str]:
    """The stages of an iteration; nothing is clustered where its codes were imported."""
    folder = workdir / config.iteration
    arrows = ["features", "cluster", "label", "pretrain"]
    if cards.is_imported(folder / "codebook.json") or labels_are_imported(folder):
        arrows.remove("cluster")
        if not config.features.dump:
            arrows.remove("features")
    if not config.train.num_steps:
        arrows.remove("pretrain")
    return arrows


def labels_are_imported(folder: epath.Path) -> bool:
    return cards.is_imported(folder / "labels" / "train" / "card.json")


def walk(stage: str, config, workdir: epath.Path, *, place: str) -> None:
    logs.info(place)
    started = time.monotonic()
    importlib.import_module(f"hubert_jax.stages.{stage}").run(config, workdir)
    logs.info(f"{place}: {logs.clock(time.monotonic() - started)}")


def outputs(configs: Sequence[Any], workdir: epath.Path) -> str:
    """Where the last codebook, its labels and the checkpoints lie, and the next command."""
    last, folder = configs[-1], workdir / configs[-1].iteration
    lines = [f"  labels       {folder / 'labels'}"]
    has_codebook = not labels_are_imported(folder) or (folder / "codebook.npz").exists()
    if has_codebook:
        lines.insert(0, f"  codebook     {folder / 'codebook.npz'}")
    trained = [workdir / c.iteration / "checkpoints" for c in configs if c.train.num_steps > 0]
    lines += [f"  checkpoints  {checkpoints}" for checkpoints in trained]
    if trained and has_codebook and last.features.kind == "layer":
        lines += [
            "units of other audio:",
            f"  hubert export units --checkpoint={trained[-1]}"
            f" --codebook={folder / 'codebook.npz'} --audio=FOLDER --out=FOLDER",
        ]
    return "\n".join(lines)


def score_table(configs: Sequence[Any], workdir: epath.Path) -> str:
    """The scores in the label cards, a row per kind of feature that was clustered."""
    scored = {}
    for split in ("validation", "test"):  # test, where it has scores
        rows = {row_name(config): scores_of(config, workdir, split) for config in configs}
        if any(rows.values()):
            scored = {name: row for name, row in rows.items() if row}
            scored_split = split
    if not scored:
        return "no scores: neither validation nor test audio has phone times"
    width = max(len(name) for name in scored)
    header = [" " * width, *SCORES.values(), "     K", "   frames"]
    lines = [f"labels against phones, split {scored_split!r}:", "  ".join(header)]
    for name, row in scored.items():
        cells = [f"{row[key]:.3f}".rjust(len(title)) for key, title in SCORES.items()]
        cells += [f"{row['num_codes']:6d}", f"{row['num_frames']:9d}"]
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


def row_name(config) -> str:
    return "MFCC" if config.features.kind == "mfcc" else config.features.checkpoint


def scores_of(config, workdir: epath.Path, split: str) -> dict[str, Any] | None:
    """Scores and K from the card of a split's labels; None without the split or phone times."""
    path = workdir / config.iteration / "labels" / split / "card.json"
    if not path.exists():
        return None
    card = cards.read(path)
    return {**card["scores"], "num_codes": card["num_codes"]} if card.get("scores") else None
