# SPDX-License-Identifier: Apache-2.0
"""hubert plan: what a training step takes on chips that are not here, and what fits them.

    hubert plan --config=configs/large.py --topology=v5e:8x8 [--mesh=data:8,fsdp:8]
    hubert plan --config=configs/large.py --topology=h100:4x8        # four nodes of eight GPUs
    hubert plan --config=configs/base.py --weak_scaling=v5e:2x2,v5e:4x4,v5e:8x8 --mesh=data:-1

For TPUs (v4, v5e, v5p, v6e) the real step is compiled, without a TPU, by the libtpu that
`pip install 'hubert_jax[plan]'` brings: minutes for each length. For GPUs (h100, h200), and with
--estimate, everything is counted by hand. Lengths are the rungs of --workdir's corpus, those of
batch.rungs, or --seconds; without any, batch.max_seconds alone, which needs most. Time is always
an estimate, from the chips' public figures: from all three of arithmetic, HBM and links at once to
one after the other. Nothing is ever faster than the first.

--weak_scaling compiles for one topology after the other, every device with the rows it has on the
first, and prints what a device sends: counted in the program / predicted. cpu:8 are eight fakes.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from hubert_jax import config_files, logs, sharding
from hubert_jax.data import batches
from hubert_jax.data.corpus import Corpus
from hubert_jax.heads import HeadConfig
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames
from hubert_jax.optim import OptimConfig
from hubert_jax.planning import advice, chips, compiled, estimate, scaling
from hubert_jax.planning.chips import GIB, Topology
from hubert_jax.planning.estimate import Estimate
from hubert_jax.planning.work import Work
from hubert_jax.pretraining import LossConfig

MEMORY = (
    "length", "rows", "parameters", "optimiser", "temporaries", "peak GiB", "of HBM", "source",
)  # fmt: skip
TIME = (
    "length", "TFLOP", "recomputed", "HBM GB", "sent GB", "step s", "MFU %", "audio-s/s", "hours",
    "device-hours",
)  # fmt: skip
SENT = ("length", "collective", "over", "times", "counted MB", "predicted MB")


class Rung(NamedTuple):
    num_samples: int
    rows: int  # of a global batch
    share: float  # of the steps


def main(argv: Sequence[str]) -> None:
    overrides, words = config_files.split_overrides(list(argv))
    top = parser()
    args = top.parse_args(words)
    config = config_files.configured(top, args.config, overrides)
    jax.config.update("jax_platforms", "cpu")  # what is planned for is not here
    if args.weak_scaling:
        if args.estimate or args.out:
            top.error("--weak_scaling prints what it compiles: no --estimate, no --out")
        print(weak_scaling(config, args))
        return
    topology = chips.topology(args.topology)
    asked = args.mesh or config.mesh.to_dict()
    mesh = sharding.mesh_sizes(**asked, num_devices=topology.num_devices)
    counted = args.estimate or not topology.chip.is_tpu

    works = [(rung, work(config, mesh, rung)) for rung in ladder(config, mesh, args)]
    rows: dict[str, list[tuple]] = {"memory": [], "time": [], "sent": []}
    num_programs = 0
    warnings: list[str] = []
    gathered: list[str] = []
    for _, one in works:
        expected = estimate.estimate(one, topology)
        measured = None
        if not counted:
            logs.info(f"compiling {_length(one)} for {topology.name} ...")
            measured = compiled.measure(one, topology)
            logs.info(f"compiled in {measured.seconds:.0f} s")
            num_programs += measured.fits
            warnings += measured.rematerializations
            gathered += map(str, compiled.gathered_activations(one, measured.collectives))
        rows["memory"].append(memory_row(one, expected, measured, topology))
        rows["time"].append(time_row(one, expected))
        rows["sent"] += sent_rows(one, expected, measured)

    print(heading(config, topology, mesh, works[0][1], counted))
    print(logs.table([MEMORY, *rows["memory"]]))
    print(logs.table([TIME, *rows["time"]]))
    print(logs.table([SENT, *rows["sent"]]))
    if not counted:
        print(
            f"{num_programs} of {len(works)} programs made; {len(warnings)} involuntary full"
            f" rematerializations, {len(gathered)} gathers of activations over fsdp",
            *warnings, *gathered, sep="\n",
        )  # fmt: skip
    print(schedule(works, topology))
    print(recommendation(works[-1][1], topology, config.batch.row_multiple))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hubert plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--config", required=True, metavar="FILE[:ITERATION]")
    where = top.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", metavar="CHIP:SHAPE")
    where.add_argument("--weak_scaling", type=_topologies, metavar="CHIP:SHAPE,CHIP:SHAPE")
    top.add_argument("--mesh", type=_mesh, metavar="data:8,fsdp:8", help="default: config.mesh")
    top.add_argument("--seconds", type=float, nargs="+", help="lengths to plan for")
    top.add_argument("--workdir", type=epath.Path, help="whose corpus gives the lengths")
    top.add_argument("--estimate", action="store_true", help="count by hand, compile nothing")
    top.add_argument("--out", type=epath.Path, metavar="FILE", help="the tables as JSON")
    return top


def _mesh(text: str) -> dict[str, int]:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in sizes or not size.lstrip("-").isdigit():
            raise argparse.ArgumentTypeError(f"{part!r}: write data:8,fsdp:8,tensor:1")
        sizes[axis] = int(size)
    return sizes


def _topologies(text: str) -> list[Topology]:
    try:
        return [scaling.topology(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def ladder(config: Any, mesh: dict[str, int], args: argparse.Namespace) -> list[Rung]:
    """The lengths to plan for, shortest first."""
    ways = mesh["data"] * mesh["fsdp"] * config.train.accumulate
    batch = batches.BatchConfig(**config.batch)
    multiple = ways * -(-batch.row_multiple // ways)  # the next that these devices can share
    if multiple != batch.row_multiple:
        logs.info(f"start with --config.batch.row_multiple={multiple}: {ways} share a batch")
    if args.workdir:
        num_samples_N = Corpus(args.workdir / "corpus").split("train").num_samples
        batch = dataclasses.replace(batch, row_multiple=multiple)
        plan = batches.Plan(num_samples_N, batch, seed=config.seed, row_multiple=ways)
        return [
            Rung(rung, plan.rows(rung), plan.num_batches(rung) / plan.batches_per_epoch)
            for rung in plan.rungs
        ]
    seconds = sorted(args.seconds or batch.rungs or [batch.max_seconds])
    rungs = []
    for length in seconds:
        num_samples = frames.num_samples(frames.num_frames(round(length * frames.SAMPLE_RATE)))
        rows = advice.rows(batch.seconds, num_samples, multiple)
        if not rows:
            raise ValueError(
                f"batch.seconds {batch.seconds:g} are fewer than {multiple} rows of {length:g} s,"
                f" which {ways} (devices x train.accumulate) share: raise batch.seconds to"
                f" {multiple * length:g} or use fewer devices"
            )
        rungs.append(Rung(num_samples, rows, 1 / len(seconds)))
    return rungs


def work(config: Any, mesh: dict[str, int], rung: Rung) -> Work:
    # What "auto" is on accelerators.
    auto = {"compute_dtype": "bfloat16", "unroll": "no"}
    chosen = {name: value for name, value in auto.items() if config.model[name] == "auto"}
    return Work(
        model=HubertConfig(**(config.model.to_dict() | chosen)),
        head=HeadConfig(**config.head),
        num_codes=(config.kmeans.num_codes,) * len(config.train.labels),
        loss=LossConfig(**config.loss),
        optim=OptimConfig(**config.optim),
        num_steps=config.train.num_steps,
        mesh=mesh,
        rows=rung.rows,
        num_samples=rung.num_samples,
        accumulate=config.train.accumulate,
    )


def weak_scaling(config: Any, args: argparse.Namespace) -> str:
    """The table of a series of topologies; the mesh takes up what is added where it is -1."""
    asked = args.mesh or config.mesh.to_dict()
    meshes = [
        sharding.mesh_sizes(**asked, num_devices=topology.num_devices)
        for topology in args.weak_scaling
    ]
    first = work(config, meshes[0], ladder(config, meshes[0], args)[-1])
    series = []
    for topology, mesh in zip(args.weak_scaling, meshes, strict=True):
        logs.info(f"compiling for {topology.name} ...")
        series.append(scaling.measure(scaling.on_mesh(first, mesh), topology))
    header = ("collective", "over", *(topology.name for topology in args.weak_scaling))
    return (
        f"\n{config.iteration}, {first.rows_per_device} rows of {_length(first)} a device, mesh"
        f" {asked}: MB sent by a device in a step, counted / predicted\n"
        + logs.table([header, *scaling.rows(series)])
    )


# What is printed.


def heading(config: Any, topology: Topology, mesh: dict[str, int], one: Work, counted: bool) -> str:
    chip = topology.chip
    how = "an estimate: counted by hand, not compiled" if counted else "compiled by XLA"
    return (
        f"\n{config.iteration} on {topology.name}, {topology.num_devices} devices as"
        f" {' x '.join(f'{axis} {size}' for axis, size in mesh.items())}; remat"
        f" {one.model.remat}, {one.accumulate} part(s) a batch. Per device and step; memory and"
        f" collectives {how}.\n{chip.name}: {chip.peak / 1e12:.0f} TFLOP/s in bfloat16,"
        f" {chip.hbm / GIB:.0f} GiB at {chip.bandwidth / 1e12:.2f} TB/s, links of"
        f" {chip.link / 1e9:.0f} GB/s one way"
        + (f", {chip.network / 1e9:.0f} GB/s to other nodes" if chip.network else "")
    )


def memory_row(
    one: Work, expected: Estimate, measured: compiled.Measured | None, topology: Topology
) -> tuple:
    memory = expected.memory
    if measured is None:
        parts = (memory.parameters, memory.optimizer, memory.gradients + memory.activations)
        peak, fits, source = memory.peak, estimate.fits(memory, topology), "estimate"
    else:
        parts = (measured.parameters, measured.optimizer, measured.temporaries)
        peak, fits, source = measured.peak, measured.fits, "compiled"
    share = f"{100 * peak / topology.chip.hbm:.0f} %{'' if fits else ', DOES NOT FIT'}"
    return (
        _length(one), f"{one.rows_per_device}", *(f"{part / GIB:.2f}" for part in parts),
        f"{peak / GIB:.2f}", share, source,
    )  # fmt: skip


def time_row(one: Work, expected: Estimate) -> tuple:
    times = (expected.shortest, expected.longest)
    hours = [seconds * one.num_steps / 3600 for seconds in times]
    return (
        _length(one), f"{expected.operations / 1e12:.2f}", f"{expected.recomputed / 1e12:.2f}",
        f"{expected.moved / 1e9:.1f}", f"{sum(expected.sent.values()) / 1e9:.2f}",
        _range(times, "{:.3f}"), _range([100 * expected.mfu(t) for t in times], "{:.0f}"),
        _range([one.audio_seconds / t for t in times], "{:.0f}"), _range(hours, "{:.1f}"),
        _range([one.num_devices * h for h in hours], "{:.0f}"),
    )  # fmt: skip


def sent_rows(one: Work, expected: Estimate, measured: compiled.Measured | None) -> list[tuple]:
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for each in measured.collectives if measured else ():
        key = (each.kind, "+".join(each.axes))
        times, size = found.get(key, (0, 0.0))
        found[key] = times + each.times, size + each.times * each.sent_bytes
    rows = []
    for key in sorted(found.keys() | expected.sent.keys()):
        times, size = found.get(key, (0, 0.0))
        counted = (f"{times}", f"{size / 1e6:.1f}") if measured and measured.fits else ("", "")
        rows.append((_length(one), *key, *counted, f"{expected.sent.get(key, 0.0) / 1e6:.1f}"))
    return rows


def schedule(works: list[tuple[Rung, Work]], topology: Topology) -> str:
    """Hours of the whole schedule, from the estimates of every length and their shares."""
    shortest = longest = 0.0
    for rung, one in works:
        expected = estimate.estimate(one, topology)
        shortest += rung.share * expected.shortest * one.num_steps / 3600
        longest += rung.share * expected.longest * one.num_steps / 3600
    hours = _range((shortest, longest), "{:.1f}")
    device_hours = _range([topology.num_devices * h for h in (shortest, longest)], "{:.0f}")
    return (
        f"{works[0][1].num_steps} steps: {hours} hours, {device_hours} device-hours, without"
        " validation, checkpoints and waiting for data"
    )


def recommendation(one: Work, topology: Topology, row_multiple: int) -> str:
    found = advice.best(one, topology)
    if found is None:
        return f"nothing fits {topology.num_devices} {topology.chip.name}, by the estimate"
    return (
        f"recommended, by the estimate: {found.flags(one, row_multiple)}\n"
        f"  {found.work.rows_per_device} rows of {_length(one)} a device at once,"
        f" {found.estimate.memory.peak / GIB:.1f} GiB, {found.estimate.longest:.3f} s a step"
    )


def _length(one: Work) -> str:
    return f"{one.num_samples / frames.SAMPLE_RATE:.2f} s"


def _range(values: Sequence[float], form: str) -> str:
    low, high = (form.format(value) for value in sorted(values))
    return low if low == high else f"{low} to {high}"
