# SPDX-License-Identifier: Apache-2.0
"""The HuBERT encoder: seven convolutions, a position convolution and a transformer.

Read from the top: `Encoder` says in which order things happen, its parts follow. Modules are Flax
NNX modules in tree form, that is, plain pytrees of parameters: jax.grad, jax.vmap and optax take
them as they are. Source: Hsu et al., 2021 (arXiv 2106.07447) and fairseq's HubertModel; every
comment "reference" means the latter.

B batch, S samples, T frames, C conv channels, D width, F feed-forward, L layers
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hubert_jax.attention import Attention
from hubert_jax.convolutions import Conv, GroupNorm
from hubert_jax.layers import (
    LayerNorm,
    Linear,
    bert_normal,
    dropout,
    gelu,
    scale_gradient,
    torch_uniform,
)
from hubert_jax.ops import frames
from hubert_jax.positions import PositionConv
from hubert_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class HubertConfig:
    """Everything that decides what an encoder computes; the defaults live in configs/."""

    conv_width: int
    conv_norm: str  # "group": GroupNorm after the first convolution; "layer": LayerNorm after all
    conv_bias: bool
    width: int
    ffn_width: int
    num_heads: int
    num_layers: int
    pre_norm: bool
    position_kernel: int
    position_groups: int
    input_dropout: float  # after the projection
    dropout: float  # before the layers, and at the end of each residual branch
    attention_dropout: float
    activation_dropout: float
    layer_drop: float
    gradient_scale: float  # of what flows back into the convolutions
    mask_prob: float
    mask_length: int  # frames
    normalize_audio: bool  # whole utterances come with zero mean and unit variance
    compute_dtype: str  # "auto": bfloat16 on accelerators, float32 on CPU
    unroll: str  # layers in a loop ("yes") or scanned ("no"); "auto": scanned on TPU alone
    remat: str  # "none", "layer" (keep layer inputs only) or "dots" (keep matmul results)

    def __post_init__(self):
        if self.width % self.num_heads or self.width % self.position_groups:
            raise ValueError(
                f"model.width {self.width} must be a multiple of num_heads {self.num_heads} and of"
                f" position_groups {self.position_groups}"
            )
        _choice("conv_norm", self.conv_norm, ("group", "layer"))
        _choice("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        _choice("unroll", self.unroll, ("auto", "yes", "no"))
        _choice("remat", self.remat, ("none", "layer", "dots"))

    @property
    def dtype(self) -> jnp.dtype:
        if self.compute_dtype == "auto":
            return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return jnp.dtype(self.compute_dtype)

    @property
    def loops(self) -> bool:
        """Whether layers run in a Python loop, whose program takes longer to compile, once. A scan
        stacks what the backward pass needs: a tenth of a step on a CPU, a quarter on a GPU.
        """
        return jax.default_backend() != "tpu" if self.unroll == "auto" else self.unroll == "yes"


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"model.{name} is {value!r}, but must be one of {', '.join(choices)}")


class Encoder(nnx.Module):
    """Waveform in, frames of any layer out."""

    def __init__(self, config: HubertConfig, *, key):
        keys = jax.random.split(key, 5)
        width = config.width
        self.config = config
        self.extractor = Extractor(config, key=keys[0])
        self.projection_norm = LayerNorm(config.conv_width, axis="conv_in")
        self.projection = Linear(
            config.conv_width, width, key=keys[1], init=torch_uniform, axes=("conv_in", "width")
        )
        self.mask_embedding_D = nnx.Param(jax.random.uniform(keys[2], (width,)), axes=("width",))
        self.position = PositionConv(config, key=keys[3])
        self.norm = LayerNorm(width)  # before the layers in post-norm, after them in pre-norm
        self.layers = jax.vmap(lambda key: Block(config, key=key))(
            jax.random.split(keys[4], config.num_layers)
        )

    def extract(self, wave_BS, *, num_samples_B=None, padding: str = "exact"):
        """Output of the convolutions, before any projection: (B, T, C)."""
        if wave_BS.shape[1] < frames.RECEPTIVE_FIELD:
            raise ValueError(
                f"{wave_BS.shape[1]} samples are no frame: one takes {frames.RECEPTIVE_FIELD}; pad"
                " with zeros and give num_samples_B, or leave them out"
            )
        wave_BS = wave_BS.astype(self.config.dtype)
        return self.extractor(wave_BS, num_samples_B=num_samples_B, padding=padding)

    def contextualize(self, conv_BTC, *, mask_BT=None, valid_BT=None, num_layers=None, key=None):
        """From the convolutions' output to the output of the layers: (B, T, D).

        `mask_BT` are frames hidden behind the mask embedding, `valid_BT` frames that are not
        padding (None: all), `key` switches dropout and layer drop on. With `num_layers` given,
        that many layers run and a pre-norm model's last norm is left out.
        """
        config = self.config
        keys = iter([None] * 3 if key is None else jax.random.split(key, 3))
        x_BTD = self.projection(self.projection_norm(conv_BTC))
        x_BTD = dropout(x_BTD, config.input_dropout, next(keys))
        if mask_BT is not None:
            mask_embedding_D = self.mask_embedding_D[...].astype(x_BTD.dtype)
            x_BTD = jnp.where(mask_BT[..., None], mask_embedding_D, x_BTD)
        if valid_BT is not None:
            x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)
        x_BTD = x_BTD + self.position(x_BTD)
        if not config.pre_norm:
            x_BTD = self.norm(x_BTD)
        x_BTD = dropout(x_BTD, config.dropout, next(keys))
        x_BTD = constrain(x_BTD, "batch", "frames", "residual")
        x_BTD = self._run_layers(x_BTD, valid_BT, num_layers, next(keys))
        if config.pre_norm and num_layers is None:
            x_BTD = self.norm(x_BTD)
        return x_BTD

    def features(self, wave_BS, *, layer: int, num_samples_B=None, padding: str = "exact"):
        """Output of layer `layer`, float32 (B, T, D): only the first `layer` layers are computed.

        Layer 0 is the input of the first block; no layer has a pre-norm model's last norm.
        `num_samples_B` gives the length of each padded row. Padding "exact": the frames of an
        utterance do not depend on the batch it is in; "reference": what fairseq computes, whose
        group norm sees the padding.
        """
        if not 0 <= layer <= self.config.num_layers:
            raise ValueError(f"layer {layer}: this model has layers 0 to {self.config.num_layers}")
        conv_BTC = self.extract(wave_BS, num_samples_B=num_samples_B, padding=padding)
        valid_BT = None
        if num_samples_B is not None:
            valid_BT = valid_frames(wave_BS.shape[1], num_samples_B, padding=padding)
        x_BTD = self.contextualize(conv_BTC, valid_BT=valid_BT, num_layers=layer)
        return x_BTD.astype(jnp.float32)

    def _run_layers(self, x_BTD, valid_BT, num_layers, key):
        config = self.config
        num_layers = config.num_layers if num_layers is None else num_layers
        if num_layers == 0:
            return x_BTD
        keys_L = None if key is None else jax.random.split(key, num_layers)

        def run(x_BTD, layer_and_key):
            layer, key = layer_and_key
            if key is None or config.layer_drop == 0:
                return layer(x_BTD, valid_BT, key=key), None
            drop_key, key = jax.random.split(key)
            kept = jax.random.bernoulli(drop_key, 1 - config.layer_drop)
            return jax.lax.cond(
                kept, lambda x: layer(x, valid_BT, key=key), lambda x: x, x_BTD
            ), None

        if config.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            run = jax.checkpoint(run, policy=dots if config.remat == "dots" else None)
        if not config.loops:
            layers = jax.tree.map(lambda param_L: param_L[:num_layers], self.layers)
            return jax.lax.scan(run, x_BTD, (layers, keys_L))[0]
        keys = [None] * num_layers if keys_L is None else list(keys_L)
        run = jax.jit(run)  # in a program traced once, not for each layer anew
        for layer_and_key in zip(self._blocks()[:num_layers], keys, strict=True):
            x_BTD, _ = run(x_BTD, layer_and_key)
        return x_BTD

    def apart(self) -> "Encoder":
        """The same for inference, where layers run in a loop: each has arrays of its own.

        Out of stacked ones XLA copies them at every call (docs/LOG.md). Weights are named, sharded
        and saved as stacked ones.
        """
        if not self.config.loops or isinstance(self.layers, nnx.List):
            return self
        encoder = jax.tree.map(lambda array: array, self)  # a shallow copy
        # one program, not one for each slice
        encoder.layers = nnx.List(
            jax.jit(_unstack, static_argnums=1)(self.layers, self.config.num_layers)
        )
        return encoder

    def _blocks(self) -> list["Block"]:
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        return _unstack(self.layers, self.config.num_layers)


def valid_frames(num_padded_samples: int, num_samples_B, *, padding: str):
    """Which frames of padded rows are real: valid_BT. Raises ValueError on an unknown padding."""
    num_frames = frames.num_frames(num_padded_samples)
    if padding == "exact":
        valid_frames_B = frames.num_frames(num_samples_B)
    elif padding == "reference":  # a frame is real if its share of the samples touches real ones
        valid_frames_B = -(-num_samples_B // (num_padded_samples // num_frames))
    else:
        raise ValueError(f"padding is {padding!r}, but must be 'exact' or 'reference'")
    return jnp.arange(num_frames) < valid_frames_B[:, None]


class Extractor(nnx.Module):
    """Seven strided convolutions, 400 samples to a frame every 320, then scaled gradients."""

    def __init__(self, config: HubertConfig, *, key):
        keys = jax.random.split(key, len(frames.CONV_LAYERS))
        widths = [1] + [config.conv_width] * len(frames.CONV_LAYERS)
        self.config = config
        self.convs = nnx.List(
            [
                Conv(width_in, width_out, kernel, stride, bias=config.conv_bias, key=key)
                for (kernel, stride), width_in, width_out, key in zip(
                    frames.CONV_LAYERS, widths[:-1], widths[1:], keys, strict=True
                )
            ]
        )
        num_norms = 1 if config.conv_norm == "group" else len(frames.CONV_LAYERS)
        norm = GroupNorm if config.conv_norm == "group" else LayerNorm
        norms = [norm(config.conv_width, axis="conv_out") for _ in range(num_norms)]
        self.norms: Any = nnx.List(norms)

    def __call__(self, wave_BS, *, num_samples_B, padding):
        first, *others = self.convs
        if self.config.conv_norm == "layer":
            x_BTC = self.norms[0](first(wave_BS[..., None]))
        else:
            exact = padding == "exact" and num_samples_B is not None
            lengths_B = frames.conv_lengths(num_samples_B)[0] if exact else None
            x_BTC = self.norms[0](first, wave_BS, lengths_B)
        for i, conv in enumerate(others, 1):
            x_BTC = conv.after_gelu(x_BTC)
            if self.config.conv_norm == "layer":
                x_BTC = self.norms[i](x_BTC)
        x_BTC = gelu(x_BTC)[:, : frames.num_frames(wave_BS.shape[1])]
        x_BTC = scale_gradient(x_BTC, self.config.gradient_scale)
        return constrain(x_BTC, "batch", "frames", "residual")


class Block(nnx.Module):
    """One transformer layer, normalised after each branch (base) or before it (large, xlarge)."""

    def __init__(self, config: HubertConfig, *, key):
        attention_key, key_in, key_out = jax.random.split(key, 3)
        width, ffn_width = config.width, config.ffn_width
        self.config = config
        self.attention = Attention(
            width, config.num_heads, dropout=config.attention_dropout, key=attention_key
        )
        self.attention_norm = LayerNorm(width)
        self.ffn_in = Linear(width, ffn_width, key=key_in, init=bert_normal, axes=("width", "ffn"))
        self.ffn_out = Linear(
            ffn_width, width, key=key_out, init=bert_normal, axes=("ffn", "width")
        )
        self.ffn_norm = LayerNorm(width)

    def __call__(self, x_BTD, valid_BT=None, *, key=None):
        config = self.config
        keys = [None] * 4 if key is None else jax.random.split(key, 4)

        def attend(x_BTD):
            return self.attention(x_BTD, valid_BT, key=keys[0])

        def feed_forward(x_BTD):
            hidden_BTF = constrain(self.ffn_in.gelu(x_BTD), "batch", "frames", "ffn")
            hidden_BTF = dropout(hidden_BTF, config.activation_dropout, keys[2])
            return self.ffn_out(hidden_BTF)

        rate = config.dropout
        if config.pre_norm:
            x_BTD = x_BTD + dropout(attend(self.attention_norm(x_BTD)), rate, keys[1])
            x_BTD = x_BTD + dropout(feed_forward(self.ffn_norm(x_BTD)), rate, keys[3])
        else:
            x_BTD = self.attention_norm.of_sum(x_BTD, attend(x_BTD), rate=rate, key=keys[1])
            x_BTD = self.ffn_norm.of_sum(x_BTD, feed_forward(x_BTD), rate=rate, key=keys[3])
        return constrain(x_BTD, "batch", "frames", "residual")


def _unstack(tree, num: int) -> list:
    """The slices of a stacked tree along its first axis; their gradients are concatenated."""
    leaves, treedef = jax.tree.flatten(tree)
    slices = [jnp.split(leaf, num) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [part[i][0] for part in slices]) for i in range(num)]
