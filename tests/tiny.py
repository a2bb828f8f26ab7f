# SPDX-License-Identifier: Apache-2.0
"""The smallest models that still have every part, for all tests."""

import dataclasses
import functools

import jax

from hubert_jax.heads import HeadConfig, Hubert
from hubert_jax.model import HubertConfig

BASE = HubertConfig(
    conv_width=16, conv_norm="group", conv_bias=False, width=32, ffn_width=64, num_heads=4,
    num_layers=3, pre_norm=False, position_kernel=128, position_groups=4, input_dropout=0.0,
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layer_drop=0.0,
    gradient_scale=0.1, mask_prob=0.8, mask_length=10, normalize_audio=False,
    compute_dtype="float32", unroll="no", remat="none",
)  # fmt: skip
LARGE = dataclasses.replace(
    BASE, conv_norm="layer", pre_norm=True, gradient_scale=1.0, normalize_audio=True
)
HEAD = HeadConfig(code_width=8, temperature=0.1, untied=False, code_init="uniform")
KINDS = {"base": BASE, "large": LARGE}


def model(config: HubertConfig = BASE, *, num_codes=(12,), head: HeadConfig = HEAD) -> Hubert:
    return Hubert(config, head, num_codes, key=jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("layer", "padding"))
def features(encoder, wave_BS, *, layer, num_samples_B=None, padding="exact"):
    return encoder.features(wave_BS, layer=layer, num_samples_B=num_samples_B, padding=padding)


@jax.jit
def extract(encoder, wave_BS):
    return encoder.extract(wave_BS)


@functools.partial(jax.jit, static_argnames="num_layers")
def contextualize(encoder, conv_BTC, *, mask_BT=None, num_layers=None, key=None):
    return encoder.contextualize(conv_BTC, mask_BT=mask_BT, num_layers=num_layers, key=key)
