# SPDX-License-Identifier: Apache-2.0
"""The chips' public figures, and topologies by name: v5e:8x8, v5p:2x2x2, h100:8, h200:4x8.

Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e: peak in bfloat16, HBM and its bandwidth),
jax-ml.github.io/scaling-book/tpus (links: bytes per second, one way); NVIDIA's H100 SXM and H200
data sheets (dense bfloat16; NVLink 900 GB/s is both ways together; one 400 Gb/s port per GPU).
"""

import dataclasses
import math
import re
from typing import NamedTuple

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    peak: float  # bfloat16 operations per second
    hbm: float  # bytes
    bandwidth: float  # of HBM, bytes per second
    link: float  # bytes per second, one way: of one TPU link, or all of a GPU's NVLink
    torus: int  # dimensions of a TPU's torus; 0: a GPU, all of a node reach each other
    network: float  # bytes per second and GPU from node to node; 0: links only

    @property
    def is_tpu(self) -> bool:
        return self.torus > 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1.23e12, 45e9, 3, 0.0),
        Chip("v5e", 197e12, 16 * GIB, 0.82e12, 45e9, 2, 0.0),
        Chip("v5p", 459e12, 95 * GIB, 2.77e12, 90e9, 3, 0.0),
        Chip("v6e", 918e12, 32 * GIB, 1.64e12, 90e9, 2, 0.0),
        Chip("h100", 989e12, 80e9, 3.35e12, 450e9, 0, 50e9),
        Chip("h200", 989e12, 141e9, 4.8e12, 450e9, 0, 50e9),
    )
}
# XLA and the runtime keep some of HBM for themselves: 0.25 of v5e's 16 GiB, more on GPUs.
USABLE = 0.95


class Topology(NamedTuple):
    chip: Chip
    shape: tuple[int, ...]  # of the torus, or (nodes, GPUs of a node)

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def ring_bandwidth(self, num_devices: int, *, inner: bool) -> float:
        """Bytes per second that a device sends in a collective over groups of `num_devices`.

        A TPU's groups are taken to lie along one dimension of the torus, on a ring of which both
        directions are used only where it closes (a full dimension of 16 on v5e and v6e, of 4 on
        v4 and v5p). `inner`: neighbours on a GPU node; other groups cross the network.
        """
        chip = self.chip
        if chip.is_tpu:
            closes = max(self.shape) >= (16 if chip.torus == 2 else 4)
            return chip.link * (2 if closes else 1)
        return chip.link if inner and num_devices <= self.shape[-1] else chip.network


def topology(name: str) -> Topology:
    """The topology of a name like v5e:8x8 or h100:4x8 (4 nodes of 8); h100:8 is one node.

    Raises ValueError for an unknown chip or a shape that it cannot have.
    """
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(
            f"--topology={name}: give a chip of {', '.join(CHIPS)} and a shape, like v5e:4x4,"
            " v5p:2x2x2, h100:8 (one node) or h100:4x8 (four nodes of eight)"
        )
    chip, shape = CHIPS[kind], tuple(int(size) for size in sizes.split("x"))
    if not chip.is_tpu and len(shape) == 1:
        shape = (1, *shape)
    want = chip.torus or 2
    if len(shape) != want:
        raise ValueError(f"--topology={name}: a shape of {kind} has {want} sizes, not {len(shape)}")
    return Topology(chip, shape)
