# SPDX-License-Identifier: Apache-2.0
"""What the tensors alone say of a model, and what is usual where they say nothing."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hubert_jax.interchange import names
from hubert_jax.model import HubertConfig

NUM_HEADS = {768: 12, 1024: 16, 1280: 16}  # by width: base, large, xlarge
MAX_LAYERS = 1000


def config(
    state: Mapping[str, np.ndarray],
    table: names.Table,
    told: Mapping[str, Any],
    *,
    num_heads: int | None,
    origin: os.PathLike,
) -> HubertConfig:
    """The config of a torch state dict; `told` are fields that a file beside it knows.

    `num_heads` is what the caller says. The rest is that of the published models: base where the
    norm is over groups, else large. Raises ValueError where these differ, or nobody knows the
    heads; KeyError on a missing tensor.
    """
    if num_heads and told.get("num_heads", num_heads) != num_heads:
        raise ValueError(
            f"{origin}: --num_heads is {num_heads}, its config says {told['num_heads']}"
        )
    found = _shapes(state, table)
    for field, value in found.items():
        if told.get(field, value) != value:
            raise ValueError(
                f"{origin}: the config beside the tensors says {field} {told[field]!r}, they say"
                f" {value!r}"
            )
    fields = usual(found["conv_norm"]) | {"num_heads": NUM_HEADS.get(found["width"])}
    fields |= found | ({"num_heads": num_heads} if num_heads else {}) | dict(told)
    if fields["num_heads"] is None:
        raise ValueError(
            f"{origin}: the tensors do not say how many attention heads there are, which is known"
            f" for the widths {', '.join(map(str, NUM_HEADS))} only and not for {found['width']}:"
            " give --num_heads"
        )
    return HubertConfig(**fields)


def usual(conv_norm: str) -> dict[str, Any]:
    """Fields that shapes do not tell, as in the published base ("group") and large ("layer")."""
    is_base = conv_norm == "group"
    dropout = 0.1 if is_base else 0.0
    return {
        "pre_norm": not is_base,
        "input_dropout": dropout,
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": 0.0,
        "layer_drop": dropout / 2,
        "gradient_scale": 0.1 if is_base else 1.0,
        "mask_prob": 0.8,
        "mask_length": 10,
        "normalize_audio": not is_base,
        "compute_dtype": "auto",
        "unroll": "auto",
        "remat": "none",
    }


def _shapes(state: Mapping[str, np.ndarray], table: names.Table) -> dict[str, Any]:
    state = names.respelled(state, names.OLD_SPELLING)
    conv, norm = (table[f"encoder.extractor.{part}.{{i}}"] for part in ("convs", "norms"))
    position, layer = table["encoder.position"], table["encoder.layers.ffn_in"] + ".weight"
    width, group_width, kernel = state[f"{position}.weight_v"].shape
    return {
        "conv_width": len(state[conv.format(i=0) + ".weight"]),
        "conv_norm": "layer" if norm.format(i=1) + ".weight" in state else "group",
        "conv_bias": conv.format(i=0) + ".bias" in state,
        "width": width,
        "ffn_width": len(state[layer.format(i=0)]),
        "num_layers": sum(layer.format(i=i) in state for i in range(MAX_LAYERS)),
        "position_kernel": kernel,
        "position_groups": width // group_width,
    }
