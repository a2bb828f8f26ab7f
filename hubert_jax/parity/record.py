# SPDX-License-Identifier: Apache-2.0
"""What a peer computed from random weights and audio: every step on the way, as numpy arrays.

    state/NAME                 its weights, under its own names; gradients/NAME and updated/NAME are
                               the loss' gradient and the weights after one AdamW step
    wave_BS, num_samples_B, labels_BT, mask_BT    what it was given; row b ends after
                               num_samples_B[b] in the padded run
    plain/..., padded/...      two runs without a mask, each with convolutions (B, T, C),
                               projection (B, T, D), layers (L + 1, B, T, D) and output (B, T, D)
    logits_NK, loss, penalty   of a masked run; the loss in natural logarithms

B batch, S samples, T frames, C conv channels, D width, L layers, N masked frames, K codes
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# The loss and the optimiser of every record: HuBERT's own but for the learning rate.
PENALTY = 10.0
LEARNING_RATE = 0.1  # large, so that an update is not lost in the rounding of the weights
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.01


class Record(NamedTuple):
    peer: str  # "transformers", "torchaudio" or "fairseq"
    version: str
    kind: str  # "base" or "large": the norms
    model: dict[str, Any]  # fields of HubertConfig
    head: dict[str, Any]  # fields of HeadConfig
    num_codes: int
    arrays: Mapping[str, np.ndarray]

    def below(self, folder: str) -> dict[str, np.ndarray]:
        """The arrays NAME of all that are called folder/NAME."""
        start = f"{folder}/"
        return {n.removeprefix(start): x for n, x in self.arrays.items() if n.startswith(start)}


def save(record: Record, path: os.PathLike) -> None:
    card = json.dumps({name: x for name, x in record._asdict().items() if name != "arrays"})
    arrays: dict[str, Any] = {"card": np.array(card), **record.arrays}
    np.savez_compressed(path, **arrays)


def load(path: os.PathLike) -> Record:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return Record(**json.loads(str(arrays.pop("card"))), arrays=arrays)


def mask_statistics(masks_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masked frames of each row, and how many runs of masked frames have each length."""
    edges_NT = np.diff(np.pad(masks_NT, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    lengths = np.nonzero(edges_NT == -1)[1] - np.nonzero(edges_NT == 1)[1]
    return masks_NT.sum(axis=1), np.bincount(lengths)
