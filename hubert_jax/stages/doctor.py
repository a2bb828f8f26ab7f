# SPDX-License-Identifier: Apache-2.0
"""hubert doctor: looks at everything before a run, or in the middle of one.

Audio, labels, plan, memory, disk, devices, versions and, of a run that trains or has trained, its
loss. Every finding is ok, look or stop, with the reason and the remedy; the exit code is 1 where
one is stop. Nothing is written.

    hubert doctor --config=configs/base.py --workdir=work/base
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from hubert_jax import config_files, heads, locks, logs, owners, sharding
from hubert_jax.data import cards, places
from hubert_jax.data.corpus import Corpus
from hubert_jax.doctor import curves, data, disk, labels, plan
from hubert_jax.doctor.findings import Finding, as_text, graded, look, ok, stop, worst
from hubert_jax.ops import frames, mfcc


def main(argv: Sequence[str]) -> None:
    overrides, words = config_files.split_overrides(argv)
    parser = argparse.ArgumentParser(
        prog="hubert doctor", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE[:ITERATION]", required=True)
    parser.add_argument("--workdir", metavar="FOLDER", required=True)
    args = parser.parse_args(words)
    path, _, iteration = args.config.partition(":")
    first = config_files.configured(parser, args.config, overrides)
    names = [iteration] if iteration else first.iterations
    configs = [config_files.configured(parser, f"{path}:{name}", overrides) for name in names]
    found = examine(configs, epath.Path(args.workdir))
    print(as_text(found))
    counts = {level: sum(f.level == level for f in found) for level in ("ok", "look", "stop")}
    print(", ".join(f"{count} {level}" for level, count in counts.items()))
    sys.exit(1 if worst(found) == "stop" else 0)


def examine(configs: Sequence, workdir: epath.Path) -> list[Finding]:
    """All findings of the iterations whose configs are given."""
    found = [*of_versions(), of_lock(workdir)]
    corpus: Corpus | None = None
    num_samples: dict[str, int] | None
    needed: dict[str, int] = {}
    try:
        if (workdir / "corpus" / "card.json").exists():
            corpus = Corpus(workdir / "corpus")
            found += data.of_corpus(corpus)
            splits = {name: corpus.split(name) for name in corpus.splits}
            num_samples = {name: int(split.num_samples.sum()) for name, split in splits.items()}
        else:
            of_audio, num_samples = data.of_sources(configs[0].corpus)
            found += of_audio
            if num_samples is not None:
                size = disk.corpus_bytes(sum(num_samples.values()))
                needed["corpus"] = max(size - made_bytes(workdir / "corpus"), 0)
    except (ValueError, OSError) as error:
        return [*found, stop("audio: corpus", str(error), "run hubert prepare")]
    for config in configs:
        machine, problem = of_devices(config)
        found += problem
        folder = workdir / config.iteration
        parameters = num_parameters(config)
        needed |= still_needed(config, folder, num_samples, parameters)
        if corpus is not None:
            num_samples_N = np.array(corpus.split("train").num_samples)
            found += labels.of_iteration(folder, corpus)
            if config.train.num_steps:
                found += plan.of_plan(config, num_samples_N, machine)
        elif config.train.num_steps:
            found += plan.of_optimiser(config)
        if config.train.num_steps:
            guesses = labels.guesses(folder, config)
            found += [
                plan.of_memory(config, plan.size_of(config, parameters), machine),
                curves.expected(config, guesses),
                *of_training(config, folder, guesses),
            ]
    is_whole = num_samples is not None
    return found + disk.of_disk(needed, free_bytes(workdir), is_whole=is_whole)


def of_versions() -> list[Finding]:
    listed = ", ".join(f"{name} {version}" for name, version in cards.versions().items())
    return [ok("versions", f"{listed}, Python {sys.version.split()[0]}")]


def of_lock(workdir: epath.Path) -> Finding:
    try:
        owner = locks.owner_of(workdir)
    except OSError as error:
        return look("work directory", str(error), "a run there would end with the same error")
    if owner is None:
        return ok("work directory", f"{workdir}; nobody is at work in it")
    where = f"{owners.name(owner)} since {owner.get('since')}"
    return ok("work directory", f"{workdir}; {owner.get('command')} is at work in it, {where}")


def of_devices(config) -> tuple[plan.Machine, list[Finding]]:
    devices, what = jax.devices(), f"devices {config.iteration}"
    kind = f"{len(devices)} {devices[0].device_kind} ({jax.default_backend()})"
    try:
        ways = sharding.batch_ways(sharding.make_mesh(**config.mesh))
        found = ok(what, kind)
    except ValueError as error:
        ways, found = 1, stop(what, f"{kind}: {error}", "mend the section mesh")
    return plan.Machine(len(devices), ways, devices[0].device_kind, memory(devices)), [found]


def memory(devices) -> int:
    """Bytes that one device has; on CPU, of its share of the machine."""
    if jax.default_backend() != "cpu":
        return int((devices[0].memory_stats() or {}).get("bytes_limit", 0))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)


def num_parameters(config) -> int:
    model = heads.abstract(
        heads.HubertConfig(**config.model), heads.HeadConfig(**config.head),
        (config.kmeans.num_codes,),
    )  # fmt: skip
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def made_bytes(folder: epath.Path) -> int:
    """Bytes of the shards of a corpus that `hubert prepare` has not finished."""
    patterns = ("*.array_record-*", "*/*.array_record")
    return sum(path.stat().length for pattern in patterns for path in folder.glob(pattern))


def still_needed(
    config, folder: epath.Path, num_samples: Mapping[str, int] | None, parameters: int
) -> dict[str, int]:
    """Bytes of what an iteration has yet to write; of audio of unknown length, the checkpoints."""
    is_mfcc = config.features.kind == "mfcc"
    rate = frames.SAMPLE_RATE // (frames.MFCC_HOP if is_mfcc else frames.HOP)
    width = mfcc.WIDTH if is_mfcc else config.model.width
    form = dict(rate=rate, width=width, dtype=config.features.dtype)
    name, needed = config.iteration, {}
    if num_samples and not (folder / "features" / "card.json").exists():
        share = config.features.sample_share
        num = disk.features_bytes(num_samples["train"], share=share, **form)
        if config.features.dump:
            num += disk.features_bytes(sum(num_samples.values()), share=1.0, **form)
        needed[f"{name} features"] = num
    if num_samples and not (folder / "labels" / "train" / "card.json").exists():
        needed[f"{name} labels"] = disk.labels_bytes(sum(num_samples.values()), rate=rate)
    steps = config.train.num_steps
    if steps and not (folder / "checkpoints" / str(steps)).exists():
        needed[f"{name} checkpoints"] = disk.checkpoints_bytes(
            parameters, num_steps=steps, keep_last=config.checkpoints.keep_last,
            keep_every=config.checkpoints.keep_every,
        )  # fmt: skip
    return needed


def free_bytes(workdir: epath.Path) -> int | None:
    """None in a bucket, which does not tell."""
    if not places.is_local(workdir):
        return None
    folder = os.path.abspath(os.fspath(workdir))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def of_training(config, folder: epath.Path, guesses: labels.Guesses | None) -> list[Finding]:
    """Of the loss so far, and of versions that have changed since training began.

    `guesses` are for curves.of_metrics.
    """
    path, card = folder / "logs" / "metrics.jsonl", folder / "checkpoints" / "card.json"
    found: list[Finding] = []
    if card.exists():
        then = cards.read(card).get("versions", {})
        now = cards.versions()
        changed = [
            f"{name} {then[name]} -> {now.get(name)}"
            for name in then
            if then[name] != now.get(name)
        ]
        found.append(
            graded(
                f"versions {config.iteration}",
                f"since training began: {', '.join(changed) or 'the same'}",
                "the loss may differ in its last digits; install the old ones to go on exactly",
                is_look=bool(changed),
            )
        )
    if path.exists():
        found += curves.of_metrics(
            config, logs.read_metrics(path), config.kmeans.num_codes, guesses
        )
    return found
