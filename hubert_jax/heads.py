# SPDX-License-Identifier: Apache-2.0
"""What sits on the encoder: the prediction of codes, symbols for CTC, and the whole as one model.

B batch, S samples, T frames, D width, C codes, E code width, G label sets (clusterings), V symbols
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from hubert_jax import weights
from hubert_jax.layers import Linear, torch_uniform
from hubert_jax.model import Encoder, HubertConfig
from hubert_jax.ops import losses


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    code_width: int
    temperature: float
    untied: bool  # one projection per label set instead of one for all
    code_init: str  # "uniform" in (0, 1) as the reference, or "normal": codes start further apart

    def __post_init__(self):
        if self.code_init not in ("uniform", "normal"):
            raise ValueError(f"head.code_init is {self.code_init!r}: use 'uniform' or 'normal'")


@dataclasses.dataclass(frozen=True)
class CtcConfig:
    """What the outputs of a model fine-tuned with CTC stand for."""

    symbols: tuple[str, ...]
    blank: int  # which of them


class CodePrediction(nnx.Module):
    """Cosine similarity of each frame's projection with the embedding of every code."""

    def __init__(self, config: HeadConfig, width: int, num_codes: tuple[int, ...], *, key):
        kernel_key, bias_key, code_key = jax.random.split(key, 3)
        projections = len(num_codes) if config.untied else 1
        shape = (projections, width, config.code_width)
        draw = jax.random.uniform if config.code_init == "uniform" else jax.random.normal
        self.config = config
        self.num_codes = num_codes
        self.kernel = nnx.Param(
            torch_uniform(kernel_key, shape, width), axes=("frames", "width", "code_width")
        )
        self.bias = nnx.Param(
            torch_uniform(bias_key, (projections, config.code_width), width),
            axes=("frames", "code_width"),
        )
        self.codes_CE = nnx.Param(
            draw(code_key, (sum(num_codes), config.code_width)), axes=("code", "code_width")
        )

    def __call__(self, x_BTD) -> list[jax.Array]:
        """Logits of every label set, each (B, T, C_g) in float32."""
        starts = [sum(self.num_codes[:g]) for g in range(len(self.num_codes))]
        logits = []
        for g, (start, size) in enumerate(zip(starts, self.num_codes, strict=True)):
            kernel_DE = self.kernel[...][g if self.config.untied else 0]
            bias_E = self.bias[...][g if self.config.untied else 0]
            query_BTE = x_BTD @ kernel_DE.astype(x_BTD.dtype) + bias_E.astype(x_BTD.dtype)
            codes_CE = self.codes_CE[...][start : start + size]
            logits.append(
                losses.code_logits(query_BTE, codes_CE, temperature=self.config.temperature)
            )
        return logits


class Hubert(nnx.Module):
    """An encoder with what was put on it: a code prediction, an output for CTC, both or neither."""

    def __init__(
        self,
        config: HubertConfig,
        head: HeadConfig | None,
        num_codes: tuple[int, ...],
        *,
        key,
        num_symbols: int = 0,
    ):
        encoder_key, head_key = jax.random.split(key)
        ctc_key = jax.random.fold_in(key, 2)
        width = config.width
        self.encoder = Encoder(config, key=encoder_key)
        self.head = CodePrediction(head, width, num_codes, key=head_key) if head else None
        self.ctc = (
            Linear(width, num_symbols, key=ctc_key, init=torch_uniform, axes=("width", "code"))
            if num_symbols
            else None
        )

    def __call__(self, wave_BS, mask_BT, *, key=None) -> tuple[list[jax.Array], jax.Array]:
        """Logits of every label set, and the feature penalty (a scalar)."""
        assert self.head is not None
        x_BTD, penalty = self.encode(wave_BS, mask_BT, key=key)
        return self.head(x_BTD), penalty

    def encode(self, wave_BS, mask_BT, *, key=None) -> tuple[jax.Array, jax.Array]:
        """The features that the head sees (B, T, D), and the feature penalty."""
        conv_BTC = self.encoder.extract(wave_BS)
        penalty = losses.feature_penalty(conv_BTC)
        return self.encoder.contextualize(conv_BTC, mask_BT=mask_BT, key=key), penalty

    def symbols(self, wave_BS) -> jax.Array:
        """Logits of the CTC symbols, float32 (B, T, V), of rows without padding."""
        assert self.ctc is not None
        x_BTD = self.encoder.contextualize(self.encoder.extract(wave_BS))
        return self.ctc(x_BTD).astype(jax.numpy.float32)


class Weights(NamedTuple):
    """A model at rest: its arrays by dotted name, and all that it takes to build it."""

    config: HubertConfig
    head: HeadConfig | None
    num_codes: tuple[int, ...]  # of every label set; empty without a head
    ctc: CtcConfig | None
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def from_card(cls, card: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "Weights":
        """The inverse of `facts`. Cards of 0.1.0 know nothing of CTC."""
        ctc = card.get("ctc")
        return cls(
            HubertConfig(**card["model"]),
            HeadConfig(**card["head"]) if card["head"] else None,
            tuple(card["num_codes"]),
            CtcConfig(tuple(ctc["symbols"]), ctc["blank"]) if ctc else None,
            arrays,
        )

    def facts(self) -> dict[str, Any]:
        """All but the arrays, for a card."""
        return {
            "model": dataclasses.asdict(self.config),
            "head": dataclasses.asdict(self.head) if self.head else None,
            "num_codes": list(self.num_codes),
            "ctc": dataclasses.asdict(self.ctc) if self.ctc else None,
        }

    def abstract(self) -> Hubert:
        num_symbols = len(self.ctc.symbols) if self.ctc else 0
        return abstract(self.config, self.head, self.num_codes, num_symbols=num_symbols)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every array that the model has, by its dotted name."""
        return {name: x.shape for name, x in weights.to_named(self.abstract()).items()}


def abstract(
    config: HubertConfig,
    head: HeadConfig | None,
    num_codes: tuple[int, ...],
    *,
    num_symbols: int = 0,
) -> Hubert:
    """The model's shapes without its arrays."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda: Hubert(config, head, num_codes, key=key, num_symbols=num_symbols))
