# SPDX-License-Identifier: Apache-2.0
"""What sits on the encoder: the prediction of codes, and encoder and head as one model.

B batch, T frames, D width, C codes, E code width, G label sets (clusterings)
"""

import dataclasses

import jax
from flax import nnx

from hubert_jax.layers import torch_uniform
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
    """The model that is pretrained: an encoder and its code prediction."""

    def __init__(self, config: HubertConfig, head: HeadConfig, num_codes: tuple[int, ...], *, key):
        encoder_key, head_key = jax.random.split(key)
        self.encoder = Encoder(config, key=encoder_key)
        self.head = CodePrediction(head, config.width, num_codes, key=head_key)

    def __call__(self, wave_BS, mask_BT, *, key=None) -> tuple[list[jax.Array], jax.Array]:
        """Logits of every label set, and the feature penalty (a scalar)."""
        conv_BTC = self.encoder.extract(wave_BS)
        penalty = losses.feature_penalty(conv_BTC)
        x_BTD = self.encoder.contextualize(conv_BTC, mask_BT=mask_BT, key=key)
        return self.head(x_BTD), penalty


def abstract(config: HubertConfig, head: HeadConfig, num_codes: tuple[int, ...]) -> Hubert:
    """The model's shapes without its arrays."""
    return jax.eval_shape(lambda: Hubert(config, head, num_codes, key=jax.random.key(0)))
