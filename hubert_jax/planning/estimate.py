# SPDX-License-Identifier: Apache-2.0
"""Memory, operations, traffic and time of a training step, counted by hand, for any chip.

The models behind the figures stand in docs/SCALING.md, with what the compiler says beside them.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax

from hubert_jax import heads, sharding
from hubert_jax.bench import counts
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames
from hubert_jax.planning.chips import USABLE, Topology
from hubert_jax.planning.work import Work

# Bytes of the plain attention per head and pair of frames: kept for the backward pass, and moved.
# A GPU that computes without weights of T x T (attention.py) needs less.
ATTENTION_KEPT, ATTENTION_MOVED = 8, 28
# Bytes per element of the residual width D, and of the feed-forward width F, in every layer.
WIDTH_KEPT, WIDTH_MOVED = 26, 120
FFN_KEPT, FFN_MOVED = 4, 18
# Per element of the convolutions' outputs, all seven together.
CONV_KEPT, CONV_MOVED = 8, 24
UPDATE_MOVED = 36  # per parameter: gradient, parameter and two moments, read and written


class Memory(NamedTuple):
    """Bytes of one device."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float

    @property
    def peak(self) -> float:
        return sum(self)


class Estimate(NamedTuple):
    """Of one device and one step."""

    memory: Memory
    operations: float  # of the model, a multiply-add being two: what MFU counts
    recomputed: float  # operations that remat does a second time
    moved: float  # bytes to and from HBM
    sent: dict[tuple[str, str], float]  # bytes by kind of collective and mesh axis
    arithmetic_seconds: float
    hbm_seconds: float
    link_seconds: float
    peak_rate: float  # of the chip

    @property
    def shortest(self) -> float:
        """Seconds if arithmetic, HBM and links were always busy at the same time."""
        return max(self.arithmetic_seconds, self.hbm_seconds, self.link_seconds)

    @property
    def longest(self) -> float:
        """Seconds if they took turns."""
        return self.arithmetic_seconds + self.hbm_seconds + self.link_seconds

    def mfu(self, seconds: float) -> float:
        return self.operations / seconds / self.peak_rate


def estimate(work: Work, topology: Topology) -> Estimate:
    operations = work.rows * counts.training(work.model, work.num_samples) / work.num_devices
    recomputed = work.rows * _recomputed(work.model, work.num_samples) / work.num_devices
    moved = _moved(work)
    sent = predicted(work)
    inner = {"tensor": True, "fsdp": work.mesh["tensor"] * work.mesh["fsdp"] <= topology.shape[-1]}
    link_seconds = sum(
        size / topology.ring_bandwidth(_group(work, axis), inner=inner.get(axis, False))
        for (_, axis), size in sent.items()
    )
    if topology.num_devices <= topology.shape[-1]:  # all on one node, or on one ring
        link_seconds = sum(sent.values()) / topology.ring_bandwidth(work.num_devices, inner=True)
    return Estimate(
        memory(work),
        operations,
        recomputed,
        moved,
        sent,
        arithmetic_seconds=(operations + recomputed) / topology.chip.peak,
        hbm_seconds=moved / topology.chip.bandwidth,
        link_seconds=link_seconds,
        peak_rate=topology.chip.peak,
    )


def _group(work: Work, axis: str) -> int:
    return math.prod(work.mesh[name] for name in axis.split("+"))


def memory(work: Work) -> Memory:
    parameters = 4.0 * sum(local for _, local in _parameters(work))
    # Gradients are summed where the batch is worked off in parts, so two are held.
    gradients = parameters * (1 if work.accumulate == 1 else 2)
    return Memory(parameters, 2 * parameters, gradients, _kept(work))


def _parameters(work: Work) -> list[tuple[int, int]]:
    """Elements of every parameter array: all, and those that one device holds."""
    model = dataclasses.replace(work.model, remat="none")  # which changes no parameter
    return _counted(model, work.head, work.num_codes, tuple(work.mesh.items()))


@functools.cache
def _counted(model, head, num_codes, mesh_items) -> list[tuple[int, int]]:
    made = heads.abstract(model, head, num_codes)
    shardings = sharding.param_shardings(sharding.abstract_mesh(**dict(mesh_items)), made)
    pairs = zip(jax.tree.leaves(made), jax.tree.leaves(shardings), strict=True)
    return [(leaf.size, math.prod(where.shard_shape(leaf.shape))) for leaf, where in pairs]


def _kept(work: Work) -> float:
    """Activations that wait for the backward pass, in bytes."""
    model, num_frames = work.model, work.num_frames
    attention = ATTENTION_KEPT * model.num_heads * num_frames**2 / work.mesh["tensor"]
    width = WIDTH_KEPT * num_frames * model.width
    ffn = FFN_KEPT * num_frames * model.ffn_width / work.mesh["tensor"]
    layer = attention + width + ffn
    inputs = 2 * num_frames * model.width
    dots = inputs + 2 * num_frames * (4 * model.width + model.ffn_width)
    each = {"none": layer, "dots": dots, "layer": inputs}[model.remat]
    layers = model.num_layers * each + (layer if model.remat != "none" else 0)
    return work.rows_per_device * (layers + CONV_KEPT * _conv_elements(work))


def _conv_elements(work: Work) -> int:
    """Of the outputs of all convolutions, of one row."""
    return sum(frames.conv_lengths(work.num_samples)) * work.model.conv_width


def _moved(work: Work) -> float:
    """Bytes to and from HBM in a step."""
    model, num_frames = work.model, work.num_frames
    attention = ATTENTION_MOVED * model.num_heads * num_frames**2 / work.mesh["tensor"]
    width = WIDTH_MOVED * num_frames * model.width
    ffn = FFN_MOVED * num_frames * model.ffn_width / work.mesh["tensor"]
    again = {"none": 1.0, "dots": 1.2, "layer": 4 / 3}[model.remat]
    row = model.num_layers * again * (attention + width + ffn) + CONV_MOVED * _conv_elements(work)
    update = UPDATE_MOVED * sum(local for _, local in _parameters(work))
    return work.accumulate * work.rows_per_device * row + update


def _recomputed(model: HubertConfig, num_samples: int) -> float:
    """Operations of one row that remat does a second time."""
    layers = counts.forward(model, num_samples) - counts.forward(model, num_samples, num_layers=0)
    attention = model.num_layers * 4 * frames.num_frames(num_samples) ** 2 * model.width
    return {"none": 0.0, "dots": attention, "layer": layers}[model.remat]


def predicted(work: Work) -> dict[tuple[str, str], float]:
    """Bytes that a device sends in one step, by kind of collective and axes of the mesh.

    All in the type of the computation, since the cast comes last on the way back. A parameter that
    lies split over fsdp is gathered for the forward and again for the backward pass; its gradient
    is summed and split (reduce-scatter), then summed over data. One that lies whole has its
    gradient summed over both. With tensor, each layer sums its output twice in either direction.
    Everything happens once for every part of the batch.
    """
    item = work.model.dtype.itemsize
    data, fsdp, tensor = (work.mesh[axis] for axis in sharding.MESH_AXES)
    sent: dict[tuple[str, str], float] = {}

    def add(kind: str, axis: str, size: float) -> None:
        if size:
            sent[kind, axis] = sent.get((kind, axis), 0.0) + work.accumulate * size

    for size, local in _parameters(work):
        if fsdp > 1 and size // local >= fsdp:
            gathered = local * fsdp
            add("all-gather", "fsdp", 2 * item * gathered * (fsdp - 1) / fsdp)
            add("reduce-scatter", "fsdp", item * gathered * (fsdp - 1) / fsdp)
            add("all-reduce", "data", 2 * item * local * (data - 1) / data)
        else:
            ways = data * fsdp
            axis = "+".join(name for name in ("data", "fsdp") if work.mesh[name] > 1)
            add("all-reduce", axis, 2 * item * local * (ways - 1) / ways)
    residual = item * work.rows_per_device * work.num_frames * work.model.width
    sums = 4 * work.model.num_layers * residual
    add("all-reduce", "tensor", 2 * sums * (tensor - 1) / tensor)
    return sent


def fits(memory: Memory, topology: Topology) -> bool:
    return memory.peak <= USABLE * topology.chip.hbm
