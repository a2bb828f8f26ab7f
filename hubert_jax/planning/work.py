# SPDX-License-Identifier: Apache-2.0
"""One training step: all that decides what its program is."""

import dataclasses
import math

from hubert_jax.heads import HeadConfig
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames
from hubert_jax.optim import OptimConfig
from hubert_jax.pretraining import LossConfig


@dataclasses.dataclass(frozen=True)
class Work:
    model: HubertConfig
    head: HeadConfig
    num_codes: tuple[int, ...]
    loss: LossConfig
    optim: OptimConfig
    num_steps: int
    mesh: dict[str, int]  # data, fsdp, tensor
    rows: int  # of the global batch
    num_samples: int  # of a row
    accumulate: int

    def __post_init__(self):
        ways = self.mesh["data"] * self.mesh["fsdp"] * self.accumulate
        if self.rows % ways:
            raise ValueError(
                f"{self.rows} rows of {self.num_samples / frames.SAMPLE_RATE:g} s do not divide"
                f" among {self.mesh['data']} x {self.mesh['fsdp']} devices x {self.accumulate}"
                " parts: change --config.batch.row_multiple, the mesh or train.accumulate"
            )

    @property
    def num_devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def rows_per_device(self) -> int:
        """Held at once: those of one part of the batch."""
        return self.rows // (self.mesh["data"] * self.mesh["fsdp"] * self.accumulate)

    @property
    def num_frames(self) -> int:
        return frames.num_frames(self.num_samples)

    @property
    def audio_seconds(self) -> float:
        """Of the global batch."""
        return self.rows * self.num_samples / frames.SAMPLE_RATE
