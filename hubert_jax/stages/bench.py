# SPDX-License-Identifier: Apache-2.0
"""hubert bench: how fast everything is, beside the peers that are installed.

    hubert bench [WORK ...] [--config=configs/base.py]

    training    an update                       extraction  features of a layer
    kmeans      a codebook; seeds, a pass and   mfcc        MFCC-39
                assignment by themselves
    input       FLAC in a corpus to batches     start       --help, and until a first update
    checkpoint  how long saving blocks          breakdown   where the time of an update goes

All contenders of a piece of work take turns in one process, on the same shapes in the same
precision; what is printed is the median of --rounds after two rounds to warm up (one of a whole
k-means). A ratio is a peer's time over ours. MFU is the share of the rate of a large matmul
measured here, in the same precision: operations (bench/counts.py) / seconds / devices / that rate.
Peers on a GPU run there; without one, on the CPU, where launch/local.sh should start it.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from hubert_jax import config_files, locks, logs
from hubert_jax.bench import (
    clustering,
    counts,
    memory,
    ours,
    peers,
    pipeline,
    runs,
    saving,
    table,
    timing,
)
from hubert_jax.bench.table import Row
from hubert_jax.bench.timing import WARM_UPS, Contender, Timing
from hubert_jax.data import arrays, batches
from hubert_jax.data.corpus import Corpus
from hubert_jax.heads import HeadConfig
from hubert_jax.model import HubertConfig
from hubert_jax.ops.kmeans import KMeansConfig
from hubert_jax.optim import OptimConfig

MFCC_SECONDS = 60.0
INPUT_SECONDS = 240.0  # of a batch, about what a device takes at a time
INPUT_SPLITS = {"train": 300, "validation": 10}  # utterances: an hour
WAITING_STEPS = 200
PROBE_ROWS = 4
MOST_ROWS = 256


def main(argv: Sequence[str]) -> None:
    overrides, words = config_files.split_overrides(list(argv))
    top = parser()
    args = top.parse_args(words)
    names = [*args.work, *(["breakdown"] if args.breakdown else [])]
    for name in names:
        if name not in WORK:
            top.error(config_files.unknown("work", name, list(WORK)))
    if args.rows == "max" and not args.only:
        top.error("--rows=max is for one contender that has the memory to itself: give --only")
    config = config_files.configured(top, args.config, overrides)
    if jax.default_backend() == "cpu" and "GLIBC_TUNABLES" not in os.environ:
        logs.info(
            "bench: malloc gives memory back after each turn, which costs ours most; start it by"
            " launch/local.sh bench"
        )
    rows: list[Row] = []
    for name in names or WORK:
        made = WORK[name](config, args)
        rows += with_memory(made, name, argv) if args.memory else made
    if not rows:
        raise ValueError(f"--only={args.only}: nobody is called that in {', '.join(names or WORK)}")
    print(table.printed(rows))
    if args.out:
        dtype = str(HubertConfig(**config.model).dtype)
        has_mfu = any(row.mfu is not None for row in rows)
        peaks = {dtype: ours.matmul_peak(dtype)} if has_mfu else {}
        table.write(args.out, rows, vars(args), matmul_peaks=peaks)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hubert bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("work", nargs="*", metavar="WORK", help="default: all of them")
    top.add_argument("--breakdown", action="store_true", help="the work of this name")
    top.add_argument("--config", default="configs/base.py", help="the model; --config.FIELD=VALUE")
    top.add_argument(
        "--rows", type=_rows, default=2, help="utterances in a batch (2); max: as many as fit"
    )
    top.add_argument("--seconds", type=float, default=10.0, help="their length (10)")
    top.add_argument("--rounds", type=int, default=5, help="timed calls of each (5)")
    top.add_argument("--frames", type=int, default=200_000, help="for k-means (200000)")
    top.add_argument(
        "--codebooks", default="39x100,768x500", help="widths x codes of k-means (39x100,768x500)"
    )
    top.add_argument("--n_init", type=int, default=20, help="of scikit-learn's k-means (20)")
    top.add_argument("--compile", action="store_true", help="torch.compile the peers as well")
    top.add_argument("--only", metavar="WHO", help="this contender alone, as the table calls it")
    top.add_argument(
        "--memory", action="store_true", help="each once more, in a process of its own, for memory"
    )
    top.add_argument("--workdir", type=epath.Path, help="for input: one there is, or is made here")
    top.add_argument("--demo", default="configs/demo.py", help="what start and input train")
    top.add_argument("--out", type=epath.Path, metavar="FILE", help="the table as JSON")
    return top


def _rows(text: str) -> int | str:
    return text if text == "max" else int(text)


def timed(
    work: str,
    contenders: Iterable[Contender],
    args: argparse.Namespace,
    *,
    warm_ups: int = WARM_UPS,
) -> list[Timing]:
    """The contenders asked for, in turn. Raises ValueError where --only names nobody."""
    found = list(contenders)
    chosen = [contender for contender in found if args.only in (None, contender.name)]
    if not chosen:
        raise ValueError(f"--only={args.only}: there are {', '.join(c.name for c in found)}")
    return timing.alternate(work, chosen, rounds=args.rounds, warm_ups=warm_ups)


def asked_for(contenders: Sequence[Contender], args: argparse.Namespace) -> bool:
    return args.only in (None, *(contender.name for contender in contenders))


def with_memory(rows: list[Row], name: str, argv: Sequence[str]) -> list[Row]:
    """The rows with what each contender takes, as a process says that runs it alone."""
    if name not in ("training", "extraction"):
        return rows
    words = [word for word in argv if word not in (*WORK, "--memory", "--breakdown")]
    found: dict[tuple[str, str], int | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = epath.Path(folder) / "alone.json"
        for who in dict.fromkeys(row.who for row in rows):
            logs.info(f"{name}: {who} alone, for its memory")
            alone = [*runs.PROGRAM, "bench", name, *words, f"--only={who}", f"--out={path}"]
            runs.finished([*alone, "--rounds=1"])
            found |= {(row.work, row.who): row.memory for row in table.read(path)}
    return [row._replace(memory=found[row.work, row.who]) for row in rows]


# The pieces of work.


def training(config: Any, args: argparse.Namespace) -> list[Row]:
    model = HubertConfig(**(config.model.to_dict() | {"layer_drop": 0.0}))  # peers save its time
    head, optimizer = HeadConfig(**config.head), OptimConfig(**config.optim)

    def contenders(num_rows: int) -> list[Contender]:
        wave_BS, labels_BT = ours.audio(num_rows, args.seconds, config.kmeans.num_codes)
        return [
            ours.training(model, head, optimizer, wave_BS, labels_BT),
            *peers.training(
                model, head.code_width, wave_BS, labels_BT,
                dtype=str(model.dtype), compiled=args.compile,
            ),
        ]  # fmt: skip

    num_rows = args.rows
    if num_rows == "max":
        num_rows = memory.largest(
            lambda rows: next(c for c in contenders(rows) if c.name == args.only),
            fixed=memory.state_bytes(model, head, config.kmeans.num_codes),
            limit=memory.limit(), probe=PROBE_ROWS, most=MOST_ROWS,
        )  # fmt: skip
    while True:
        work = f"training step, {num_rows} x {args.seconds:g} s, {model.dtype}"
        try:
            timings = timed(work, contenders(num_rows), args)
            break
        except RuntimeError as error:
            if args.rows != "max" or num_rows == 1 or not memory.is_exhausted(error):
                raise
        num_rows = int(memory.SMALLER * num_rows)
        logs.info(f"that did not fit: {num_rows} rows")
    operations = num_rows * counts.training(model, ours.num_samples(args.seconds))
    return _audio_rows(work, timings, num_rows, args, operations, str(model.dtype))


def extraction(config: Any, args: argparse.Namespace) -> list[Row]:
    model = HubertConfig(**config.model)
    rows = []
    for num_rows in sorted({1, args.rows}):
        wave_BS, _ = ours.audio(num_rows, args.seconds, 2)
        for layer in sorted({model.num_layers // 2, model.num_layers}):
            work = f"layer {layer}, {num_rows} x {args.seconds:g} s, {model.dtype}"
            contenders = [ours.extraction(model, wave_BS, layer=layer)]
            contenders += peers.extraction(
                model, wave_BS, layer=layer, dtype=str(model.dtype), compiled=args.compile
            )
            if not asked_for(contenders, args):
                continue  # transformers is cut to each layer under another name
            timings = timed(work, contenders, args)
            operations = num_rows * counts.forward(model, wave_BS.shape[1], num_layers=layer)
            rows += _audio_rows(work, timings, num_rows, args, operations, str(model.dtype))
    return rows


def kmeans(config: Any, args: argparse.Namespace) -> list[Row]:
    """A whole fit, and its parts."""
    rows = []
    for size in args.codebooks.split(","):
        width, num_codes = map(int, size.split("x"))
        settings = KMeansConfig(**(config.kmeans.to_dict() | {"num_codes": num_codes}))
        for piece in clustering.pieces(
            settings, num_rows=args.frames, width=width, n_init=args.n_init
        ):
            if not asked_for(piece.contenders, args):
                continue
            work = f"{piece.name}, {piece.num_rows} x {width}, K {num_codes}"
            warm_ups = 1 if piece.is_whole else WARM_UPS  # scikit-learn's may take ten minutes
            timings = timed(work, piece.contenders, args, warm_ups=warm_ups)
            notes = piece.inertias(warm_ups + args.rounds)  # centres that all have drawn
            rows += table.rows(work, timings, piece.rate, notes=notes)
    return rows


def mfcc(config: Any, args: argparse.Namespace) -> list[Row]:
    wave_S = np.float32(0.1) * ours.audio(1, MFCC_SECONDS, 2)[0][0]
    work = f"MFCC-39, {MFCC_SECONDS:g} s"
    timings = timed(work, [ours.mfccs(wave_S), *peers.mfccs(wave_S)], args)
    return table.rows(work, timings, lambda s: f"{MFCC_SECONDS / s:.0f} audio s/s")


def input_(config: Any, args: argparse.Namespace) -> list[Row]:
    """The pipeline alone, on one thread and on as many as there are cores; then in a training."""
    cores = os.cpu_count() or 1
    settings = batches.BatchConfig(**config.batch)
    left_out = f"{100 * pipeline.share_left_out(settings):.1f} % of train-clean-100 cropped away"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        workdir = args.workdir or epath.Path(folder)
        if not (workdir / "corpus" / "card.json").exists():
            logs.info(f"input: makes a corpus in {workdir}")
            with locks.held(workdir, "hubert bench input"):
                pipeline.make_work(workdir, utterances=INPUT_SPLITS, num_codes=100)
        split = Corpus(workdir / "corpus").split("train")
        labels = [arrays.Store(workdir / pipeline.LABELS / "train")]
        for num_threads in sorted({1, cores}):
            found = pipeline.rates(
                split, labels, settings, seconds=INPUT_SECONDS, num_threads=num_threads,
                rounds=args.rounds, normalize=config.model.normalize_audio,
            )  # fmt: skip
            per_core = sorted(rate.audio_seconds / rate.seconds / num_threads for rate in found)
            median = per_core[len(per_core) // 2]
            work = f"input, {num_threads} thread{'s' if num_threads > 1 else ''}, 1000 s"
            seconds = 1000 / median / num_threads
            rate = f"{median:.0f} audio s/s per core"
            rows.append(Row(work, ours.NAME, seconds, rate=rate, note=left_out))
        rows.append(_waiting(args, workdir))
    return rows


def _waiting(args: argparse.Namespace, workdir: epath.Path) -> Row:
    logs.info(f"input: {WAITING_STEPS} steps of {args.demo}")
    with tempfile.TemporaryDirectory() as folder:
        fresh = epath.Path(folder)  # checkpoints of another bench would end this training at once
        for name in ("corpus", pipeline.LABELS):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink((workdir / name).resolve(), fresh / name)
        waited = runs.waited(args.demo, fresh, num_steps=WAITING_STEPS)
    note = f"{waited.waited:.2f} s of {waited.seconds:.1f} s, {waited.num_steps} steps"
    work = f"training of {args.demo} waits for data, a step"
    return Row(work, ours.NAME, waited.waited / waited.num_steps, note=note)


def start(config: Any, args: argparse.Namespace) -> list[Row]:
    """`hubert --help`; and until a training's first update, with nothing compiled and again."""
    contender = Contender(ours.NAME, lambda: runs.help_text)
    rows = table.rows("hubert --help", timed("hubert --help", [contender], args))
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        pipeline.make_work(workdir, utterances={"train": 40, "validation": 4}, num_codes=100)
        seconds = []
        for number in range(1 + args.rounds):
            logs.info(f"start {number + 1} of {args.demo}")
            seconds.append(runs.first_update(args.demo, workdir, cache=workdir / "compiled"))
    work = f"training of {args.demo} until its first update"
    again = Timing(ours.NAME, seconds[1:]).median
    rows.append(Row(work, ours.NAME, seconds[0], note="first start: nothing compiled before"))
    rows.append(Row(work, ours.NAME, again, note="later start: from a checkpoint"))
    return rows


def checkpoint(config: Any, args: argparse.Namespace) -> list[Row]:
    model, head = HubertConfig(**config.model), HeadConfig(**config.head)
    optimizer = OptimConfig(**config.optim)
    with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
        count = 1 + args.rounds  # the first call sets things up
        found = list(saving.saves(model, head, optimizer, epath.Path(folder), count=count))
    first, rest = found[0], found[1:]
    blocked = Timing(ours.NAME, [saved.blocked for saved in rest], first.blocked)
    on_disk = Timing(ours.NAME, [saved.on_disk for saved in rest], first.on_disk)
    size = f"{first.num_bytes / 1e6:.1f} MB"
    return [
        *table.rows("checkpoint: training is blocked", [blocked]),
        *table.rows(
            f"checkpoint: until {size} are on disk", [on_disk],
            lambda seconds: f"{first.num_bytes / seconds / 1e6:.0f} MB/s",
        ),
    ]  # fmt: skip


def breakdown(config: Any, args: argparse.Namespace) -> list[Row]:
    model = HubertConfig(**(config.model.to_dict() | {"layer_drop": 0.0}))
    head, optimizer = HeadConfig(**config.head), OptimConfig(**config.optim)
    wave_BS, labels_BT = ours.audio(args.rows, args.seconds, config.kmeans.num_codes)
    work = f"parts of a step, {args.rows} x {args.seconds:g} s, {model.dtype}"
    contenders = ours.parts(model, head, optimizer, wave_BS, labels_BT)
    timings = timed(work, contenders, args)
    whole = timings[0].median
    notes = {t.name: f"{100 * t.median / whole:.1f} % of the step" for t in timings}
    return table.rows(work, timings, notes=notes)


WORK: dict[str, Callable[[Any, argparse.Namespace], list[Row]]] = {
    "training": training,
    "extraction": extraction,
    "kmeans": kmeans,
    "mfcc": mfcc,
    "input": input_,
    "start": start,
    "checkpoint": checkpoint,
    "breakdown": breakdown,
}


def _audio_rows(
    work: str,
    timings: Sequence[Timing],
    num_rows: int,
    args: argparse.Namespace,
    operations: float,
    dtype: str,
) -> list[Row]:
    alone = memory.peak() if len(timings) == 1 else None  # before the matmuls take theirs
    seconds = num_rows * args.seconds
    peak = ours.matmul_peak(dtype) * jax.device_count()
    rows = table.rows(work, timings, lambda s: f"{seconds / s:.2f} audio s/s")
    # Operations of ours: a peer that runs more layers than it was asked for has no more MFU.
    return [row._replace(mfu=operations / row.seconds / peak, memory=alone) for row in rows]
