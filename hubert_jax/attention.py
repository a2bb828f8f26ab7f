# SPDX-License-Identifier: Apache-2.0
"""Self-attention; `implementation` is the one place that chooses how a platform computes it.

B batch, T frames, D width, H heads, K head width, C query, key and value
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hubert_jax.layers import (
    AMPERE,
    Linear,
    bert_normal,
    dropout,
    has_kernels,
    has_triton,
    product,
)
from hubert_jax.sharding import constrain, cuda_capability, on_own_heads, ways

QKV_AXES = ("batch", "frames", "frames", "heads", "code_width")


def implementation(dtype, head_width: int, *, has_dropout: bool) -> str:
    """Which: two products and a softmax, "plain"; without weights of T x T, "kernels" or "cudnn".

    Plain on CPUs and TPUs and in float32. Our own kernels take heads of 16, 32 and 64 (of 128 their
    blocks are too large for some of these GPUs); cuDNN takes the multiples of 8 up to 128, but in
    JAX's interface to it no weights are dropped. Where none are, ours are used if measured quicker.
    """
    if dtype != jnp.bfloat16 or jax.default_backend() != "gpu":
        return "plain"
    if cuda_capability() < AMPERE:
        return "plain"
    is_ours = has_triton(dtype) if has_dropout else has_kernels(dtype)
    if is_ours and head_width in (16, 32, 64):
        return "kernels"
    return "cudnn" if not has_dropout and head_width % 8 == 0 and head_width <= 128 else "plain"


class Attention(nnx.Module):
    """Multi-head self-attention; heads come first, so that each is a plain matmul."""

    def __init__(self, width: int, num_heads: int, *, dropout: float, key):
        qkv_key, out_key = jax.random.split(key)
        head_width = width // num_heads
        self.dropout = dropout
        self.qkv = Linear(
            width, (3, num_heads, head_width), key=qkv_key, init=bert_normal,
            axes=("width", "frames", "heads", "code_width"),
        )  # fmt: skip
        self.out = Linear(
            (num_heads, head_width), width, key=out_key, init=bert_normal,
            axes=("heads", "code_width", "width"),
        )  # fmt: skip

    def __call__(self, x_BTD, valid_BT=None, *, key=None):
        """Frames that are not in `valid_BT` come last, and none sees them. `key` drops weights."""
        qkv_BTCHK = self._project(x_BTD)
        has_dropout = key is not None and self.dropout > 0
        how = implementation(x_BTD.dtype, qkv_BTCHK.shape[-1], has_dropout=has_dropout)
        if how == "kernels":
            qkv_BTCHK = constrain(qkv_BTCHK, *QKV_AXES)
            rate = self.dropout if has_dropout else 0.0
            mixed, axes = by_kernels(qkv_BTCHK, valid_BT, rate=rate, key=key), "bthk"
        else:
            heads_first = (2, 0, 3, 1, 4)
            qkv_CBHTK = qkv_BTCHK.transpose(heads_first)
            qkv_CBHTK = constrain(qkv_CBHTK, *(QKV_AXES[axis] for axis in heads_first))
            # by jnp.split, whose gradient is put together: that of slices is padded and added
            query_BHTK, key_BHTK, value_BHTK = (part[0] for part in jnp.split(qkv_CBHTK, 3))
            drop = functools.partial(dropout, rate=self.dropout, key=key)
            attend = by_cudnn if how == "cudnn" else functools.partial(plain, drop=drop)
            mixed, axes = attend(query_BHTK, key_BHTK, value_BHTK, valid_BT), "bhtk"
        out_BTD = jnp.einsum(f"{axes},hkd->btd", mixed, self.out.kernel[...].astype(x_BTD.dtype))
        return out_BTD + self.out.bias[...].astype(x_BTD.dtype)

    def _project(self, x_BTD):
        kernel_DCHK = self.qkv.kernel[...].astype(x_BTD.dtype)
        bias_CHK = self.qkv.bias[...].astype(x_BTD.dtype)
        if not has_kernels(x_BTD.dtype) or ways("heads") > 1:
            return product(x_BTD, kernel_DCHK) + bias_CHK
        # Of several axes, XLA writes the bias out for every frame before a GPU adds it.
        flat = x_BTD @ kernel_DCHK.reshape(len(kernel_DCHK), -1) + bias_CHK.reshape(-1)
        return flat.reshape(*x_BTD.shape[:-1], *bias_CHK.shape)


def plain(query_BHTK, key_BHTK, value_BHTK, valid_BT=None, *, drop=lambda weights: weights):
    """The values of all frames, weighted for each query; the softmax in float32."""
    if valid_BT is not None:
        key_BHTK, value_BHTK, valid_BT = _whole_blocks(key_BHTK, value_BHTK, valid_BT)
    query_BHTK = query_BHTK * (query_BHTK.shape[-1] ** -0.5)
    logits_BHTT = jnp.einsum(
        "bhqk,bhtk->bhqt", query_BHTK, key_BHTK, preferred_element_type=jnp.float32
    )
    if valid_BT is not None:
        logits_BHTT = jnp.where(valid_BT[:, None, None, :], logits_BHTT, -1e30)
    weights_BHTT = drop(jax.nn.softmax(logits_BHTT, axis=-1).astype(query_BHTK.dtype))
    return jnp.einsum("bhqt,bhtk->bhqk", weights_BHTT, value_BHTK)


def by_kernels(qkv_BTCHK, valid_BT=None, *, rate: float, key, interpret: bool = False):
    """The same with `dropout(weights, rate, key)`, the very bits, by the kernels of flash.py.

    Frames come first, as the product that makes them has it, and as the next one wants it.
    """
    from hubert_jax import flash  # needs Pallas' Triton, which only GPUs do

    batch, num_frames, _, num_heads, _ = qkv_BTCHK.shape
    if valid_BT is None:
        valid_BT = jnp.ones((batch, num_frames), bool)

    def attend(first, qkv_BTCHK, lengths_B, seeds_2):
        return flash.attend(
            qkv_BTCHK, lengths_B, seeds_2,
            rate=rate, first=first, num_heads=num_heads, interpret=interpret,
        )  # fmt: skip

    lengths_B = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
    seeds_2 = jax.random.bits(key, (2,)) if rate else jnp.zeros(2, jnp.uint32)
    return on_own_heads(attend, qkv_BTCHK, lengths_B, seeds_2, ndim=4)


def by_cudnn(
    query_BHTK, key_BHTK, value_BHTK, valid_BT=None, *, by: Literal["cudnn", "xla"] = "cudnn"
):
    """The same by one of the implementations of `jax.nn.dot_product_attention`.

    It is given lengths also where all frames are valid: without them cuDNN's gradients are reported
    to be no numbers for some T (NVIDIA/cudnn-frontend, issues 160 and 1072).
    """
    batch, _, num_frames, _ = query_BHTK.shape
    if valid_BT is None:
        valid_BT = jnp.ones((batch, num_frames), bool)
    around = ((0, 0), (0, num_frames % 2), (0, 0), (0, 0))  # it takes even numbers of frames
    query, key, value = (
        jnp.pad(x_BHTK.swapaxes(1, 2), around) for x_BHTK in (query_BHTK, key_BHTK, value_BHTK)
    )
    mixed_BTHK = jax.nn.dot_product_attention(
        query, key, value, implementation=by,
        key_value_seq_lengths=jnp.sum(valid_BT, axis=1, dtype=jnp.int32),
    )  # fmt: skip
    return mixed_BTHK[:, :num_frames].swapaxes(1, 2)


def _whole_blocks(key_BHTK, value_BHTK, valid_BT, block: int = 64):
    """With frames that are not valid, up to a multiple of `block`.

    XLA on CPU sums a product over the head's width in an order that depends on how many keys there
    are; not so for multiples of 64. So padding changes no bit of an utterance's features.
    """
    missing = -valid_BT.shape[1] % block
    around = ((0, 0), (0, 0), (0, missing), (0, 0))
    valid_BT = jnp.pad(valid_BT, ((0, 0), (0, missing)))
    return jnp.pad(key_BHTK, around), jnp.pad(value_BHTK, around), valid_BT
