# SPDX-License-Identifier: Apache-2.0
"""hubert bench: how fast training, extraction, k-means and MFCC are, beside the peers installed.

    hubert bench [training|extraction|kmeans|mfcc|start|breakdown ...] [--config=configs/base.py]

All contenders of a piece of work take turns in one process, on the same shapes in the same
precision; what is printed is the median of --rounds after two rounds to warm up. A ratio is a
peer's time over ours. MFU is the share of the rate of a 4096 x 4096 matmul measured here, in the
same precision: operations (bench/counts.py) / seconds / devices / that rate. Peers on a GPU run
there; without one, on the CPU.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from hubert_jax import config_files, logs
from hubert_jax.bench import counts, ours, peers, timing
from hubert_jax.bench.timing import Timing
from hubert_jax.data import cards
from hubert_jax.heads import HeadConfig
from hubert_jax.model import HubertConfig
from hubert_jax.ops import kmeans
from hubert_jax.optim import OptimConfig

HEADER = ("work", "who", "seconds", "first call", "rate", "ratio", "MFU", "note")
MFCC_SECONDS = 60.0


class Row(NamedTuple):
    work: str
    who: str
    seconds: float
    first: float  # seconds of the first call: compilation and warming up
    rate: str
    ratio: float | None  # to ours
    mfu: float | None
    note: str


def main(argv: Sequence[str]) -> None:
    overrides, words = config_files.split_overrides(list(argv))
    top = parser()
    args = top.parse_args(words)
    for name in args.work:
        if name not in WORK:
            top.error(config_files.unknown("work", name, list(WORK)))
    config = config_files.configured(top, args.config, overrides)
    rows = [row for work in args.work or WORK for row in WORK[work](config, args)]
    print(logs.table([HEADER, *map(_cells, rows)]))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    logs.info(f"{memory:.1f} GiB of memory at most, all contenders together")
    if args.out:
        write(rows, args.out, args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hubert bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("work", nargs="*", metavar="|".join(WORK), help="default: all of them")
    top.add_argument("--config", default="configs/base.py", help="the model; --config.FIELD=VALUE")
    top.add_argument("--rows", type=int, default=2, help="utterances in a batch (2)")
    top.add_argument("--seconds", type=float, default=10.0, help="their length (10)")
    top.add_argument("--rounds", type=int, default=5, help="timed calls of each (5)")
    top.add_argument("--frames", type=int, default=200_000, help="for k-means (200000)")
    top.add_argument("--n_init", type=int, default=20, help="of scikit-learn's k-means (20)")
    top.add_argument("--compile", action="store_true", help="torch.compile the peers as well")
    top.add_argument("--out", type=epath.Path, metavar="FILE", help="the table as JSON")
    return top


# The pieces of work.


def training(config: Any, args: argparse.Namespace) -> list[Row]:
    model = HubertConfig(**(config.model.to_dict() | {"layer_drop": 0.0}))  # peers save its time
    head, optimizer = HeadConfig(**config.head), OptimConfig(**config.optim)
    wave_BS, labels_BT = ours.audio(args.rows, args.seconds, config.kmeans.num_codes)
    work = f"training step, {args.rows} x {args.seconds:g} s, {model.dtype}"
    contenders = [ours.training(model, head, optimizer, wave_BS, labels_BT)]
    contenders += peers.training(
        model, head.code_width, wave_BS, labels_BT, dtype=str(model.dtype), compiled=args.compile
    )
    timings = timing.alternate(work, contenders, rounds=args.rounds)
    operations = args.rows * counts.training(model, wave_BS.shape[1])
    return _audio_rows(work, timings, args, operations, str(model.dtype))


def extraction(config: Any, args: argparse.Namespace) -> list[Row]:
    model = HubertConfig(**config.model)
    rows = []
    for num_rows in sorted({1, args.rows}):
        wave_BS, _ = ours.audio(num_rows, args.seconds, 2)
        for layer in sorted({model.num_layers // 2, model.num_layers}):
            work = f"layer {layer}, {num_rows} x {args.seconds:g} s, {model.dtype}"
            contenders = [ours.extraction(model, wave_BS, layer=layer)]
            contenders += peers.extraction(model, wave_BS, layer=layer)
            timings = timing.alternate(work, contenders, rounds=args.rounds)
            operations = num_rows * counts.forward(model, wave_BS.shape[1], num_layers=layer)
            rows += _audio_rows(work, timings, args, operations, str(model.dtype), num_rows)
    return rows


def clustering(config: Any, args: argparse.Namespace) -> list[Row]:
    settings = kmeans.KMeansConfig(**config.kmeans)
    rows = []
    for width, num_codes in ((39, 100), (768, 500)):
        features_ND = clustered(args.frames, width, num_codes)
        work = f"k-means, {args.frames} x {width}, K {num_codes}"
        centers: dict[str, np.ndarray] = {}
        fitted = kmeans.KMeansConfig(**(vars(settings) | {"num_codes": num_codes}))
        contenders = [ours.fit(features_ND, fitted, centers)]
        contenders += peers.fit(features_ND, num_codes, centers, n_init=args.n_init)
        timings = timing.alternate(work, contenders, rounds=args.rounds)
        notes = {n: f"inertia {ours.inertia(features_ND, x):.2f}" for n, x in centers.items()}
        rows += _rows(work, timings, lambda _: "", notes=notes)

        work = f"assignment, {args.frames} x {width}, K {num_codes}"
        nearest = centers[ours.NAME].astype(np.float32)
        contenders = [
            ours.assignment(features_ND, nearest),
            *peers.assignment(features_ND, nearest),
        ]
        timings = timing.alternate(work, contenders, rounds=args.rounds)
        rows += _rows(work, timings, lambda s: f"{args.frames / s / 1e6:.2f} M frames/s")
    return rows


def clustered(num_rows: int, width: int, num_codes: int) -> np.ndarray:
    """Rows around three times as many centres as are asked for, of unequal sizes: (N, D)."""
    rng = np.random.default_rng(0)
    centers_CD = 2 * rng.standard_normal((3 * num_codes, width), np.float32)
    shares_C = rng.dirichlet(np.full(len(centers_CD), 0.5))
    noise_ND = rng.standard_normal((num_rows, width), np.float32)
    return centers_CD[rng.choice(len(centers_CD), num_rows, p=shares_C)] + noise_ND


def mfcc(config: Any, args: argparse.Namespace) -> list[Row]:
    wave_S = np.float32(0.1) * ours.audio(1, MFCC_SECONDS, 2)[0][0]
    work = f"MFCC-39, {MFCC_SECONDS:g} s"
    contenders = [ours.mfccs(wave_S), *peers.mfccs(wave_S)]
    timings = timing.alternate(work, contenders, rounds=args.rounds)
    return _rows(work, timings, lambda s: f"{MFCC_SECONDS / s:.0f} audio s/s")


def start(config: Any, args: argparse.Namespace) -> list[Row]:
    command = [sys.executable, "-m", "hubert_jax.cli", "--help"]

    def work():
        subprocess.run(command, check=True, capture_output=True)

    contender = timing.Contender(ours.NAME, lambda: work)
    timings = timing.alternate("hubert --help", [contender], rounds=args.rounds)
    return _rows("hubert --help", timings, lambda _: "")


def breakdown(config: Any, args: argparse.Namespace) -> list[Row]:
    model, head = HubertConfig(**config.model), HeadConfig(**config.head)
    wave_BS, labels_BT = ours.audio(args.rows, args.seconds, config.kmeans.num_codes)
    work = f"parts of a step, {args.rows} x {args.seconds:g} s, {model.dtype}"
    contenders = list(ours.parts(model, head, wave_BS, labels_BT))
    timings = timing.alternate(work, contenders, rounds=args.rounds)
    return [row._replace(ratio=None) for row in _rows(work, timings, lambda _: "")]


WORK: dict[str, Callable[[Any, argparse.Namespace], list[Row]]] = {
    "training": training,
    "extraction": extraction,
    "kmeans": clustering,
    "mfcc": mfcc,
    "start": start,
    "breakdown": breakdown,
}


# The table.


def _audio_rows(
    work: str,
    timings: Sequence[Timing],
    args: argparse.Namespace,
    operations: float,
    dtype: str,
    num_rows: int | None = None,
) -> list[Row]:
    seconds = (num_rows or args.rows) * args.seconds
    peak = ours.matmul_peak(dtype) * jax.device_count()
    rows = _rows(work, timings, lambda s: f"{seconds / s:.2f} audio s/s")
    # Operations of ours: a peer that runs more layers than it was asked for has no more MFU.
    return [row._replace(mfu=operations / row.seconds / peak) for row in rows]


def _rows(
    work: str,
    timings: Sequence[Timing],
    rate: Callable[[float], str],
    notes: dict[str, str] | None = None,
) -> list[Row]:
    own = timings[0].median
    return [
        Row(
            work, t.name, t.median, t.first, rate(t.median), t.median / own, None,
            (notes or {}).get(t.name, t.note),
        )
        for t in timings
    ]  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    mfu = "" if row.mfu is None else f"{100 * row.mfu:.0f} %"
    times = (f"{row.seconds:.4g}", f"{row.first:.3g}")
    return (row.work, row.who, *times, row.rate, ratio, mfu, row.note)


def write(rows: Sequence[Row], path: epath.Path, args: argparse.Namespace) -> None:
    devices = [device.device_kind for device in jax.devices()]
    contents = {
        "rows": [row._asdict() for row in rows],
        "versions": cards.versions() | {"python": platform.python_version()},
        "devices": devices,
        "cores": os.cpu_count(),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    with cards.whole(path) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2))
