# SPDX-License-Identifier: Apache-2.0
"""Self-attention; `implementation` is the one place that chooses how a platform computes it.

B batch, T frames, D width, H heads, K head width, C query, key and value, N blocks
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hubert_jax.layers import Linear, bert_normal, drop, row_bits
from hubert_jax.sharding import constrain

FLASH_CAPABILITY = 8.0  # of NVIDIA GPUs, from which cuDNN has it: Ampere
BLOCK = 128  # queries at a time at most, where a CPU trains


def implementation(dtype, head_width: int, *, trains: bool, has_dropout: bool) -> str:
    """How a platform computes it: "plain", "blocks" or "flash", functions of this file.

    Weights of T x T are made by plain alone: on TPUs, where a CPU does not train, in a GPU's
    float32, and where it drops weights, which JAX's interface to cuDNN does not do. Of widths of a
    head cuDNN takes the multiples of 8 up to 128.
    """
    platform = jax.default_backend()
    if platform == "cpu" and trains and dtype == jnp.float32:  # bfloat16: planned for a TPU
        return "blocks"
    if platform != "gpu" or has_dropout or dtype != jnp.bfloat16:
        return "plain"
    if head_width % 8 or head_width > 128:
        return "plain"
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return "flash" if _number(capability) >= FLASH_CAPABILITY else "plain"


def _number(capability: str) -> float:
    """Of "9.0"; 0 of what AMD's GPUs say, such as "gfx942"."""
    try:
        return float(capability)
    except ValueError:
        return 0.0


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
        qkv = jnp.einsum("btd,dchk->btchk", x_BTD, self.qkv.kernel[...].astype(x_BTD.dtype))
        qkv = (qkv + self.qkv.bias[...].astype(x_BTD.dtype)).transpose(2, 0, 3, 1, 4)
        qkv = constrain(qkv, "frames", "batch", "heads", "frames", "code_width")
        query_BHTK, key_BHTK, value_BHTK = qkv
        has_dropout = key is not None and self.dropout > 0
        by = implementation(
            x_BTD.dtype, query_BHTK.shape[-1], trains=key is not None, has_dropout=has_dropout
        )
        if by == "flash":
            mixed_BHTK = flash(query_BHTK, key_BHTK, value_BHTK, valid_BT)
        else:
            shape_BHTT = (*query_BHTK.shape[:3], x_BTD.shape[1])
            bits_BHT1 = row_bits(key, shape_BHTT) if has_dropout else None
            attend = blocks if by == "blocks" else plain
            mixed_BHTK = attend(
                query_BHTK, key_BHTK, value_BHTK, valid_BT, rate=self.dropout, bits_BHT1=bits_BHT1
            )
        out_BTD = jnp.einsum("bhtk,hkd->btd", mixed_BHTK, self.out.kernel[...].astype(x_BTD.dtype))
        return out_BTD + self.out.bias[...].astype(x_BTD.dtype)


def plain(query_BHTK, key_BHTK, value_BHTK, valid_BT=None, *, rate: float = 0.0, bits_BHT1=None):
    """The values of all frames, weighted for each query; the softmax in float32.

    With `bits_BHT1`, the `row_bits` of the weights, a share `rate` of these is dropped.
    """
    if valid_BT is not None:
        key_BHTK, value_BHTK, valid_BT = _whole_blocks(key_BHTK, value_BHTK, valid_BT)
    query_BHTK = query_BHTK * (query_BHTK.shape[-1] ** -0.5)
    logits_BHTT = jnp.einsum(
        "bhqk,bhtk->bhqt", query_BHTK, key_BHTK, preferred_element_type=jnp.float32
    )
    if valid_BT is not None:
        logits_BHTT = jnp.where(valid_BT[:, None, None, :], logits_BHTT, -1e30)
    weights_BHTT = jax.nn.softmax(logits_BHTT, axis=-1).astype(query_BHTK.dtype)
    if bits_BHT1 is not None:
        weights_BHTT = drop(weights_BHTT, rate, bits_BHT1)
    return jnp.einsum("bhqt,bhtk->bhqk", weights_BHTT, value_BHTK)


def blocks(query_BHTK, key_BHTK, value_BHTK, valid_BT=None, *, rate: float = 0.0, bits_BHT1=None):
    """The same, a block of queries after the other, whose weights are computed again for gradients.

    They stay in a CPU's cache, and are not kept from layer to layer (docs/LOG.md has the times).
    """
    num_queries = query_BHTK.shape[2]
    num_blocks = -(-num_queries // BLOCK)

    def split(x_BHTK):
        """(N, B, H, T / N, K), zeros at the end where T is no multiple."""
        missing = -num_queries % num_blocks
        x_BHTK = jnp.pad(x_BHTK, ((0, 0), (0, 0), (0, missing), (0, 0)))
        batch, heads, _, width = x_BHTK.shape
        return x_BHTK.reshape(batch, heads, num_blocks, -1, width).transpose(2, 0, 1, 3, 4)

    @jax.checkpoint
    def attend(query_and_bits):
        query_BHTK, bits_BHT1 = query_and_bits
        return plain(query_BHTK, key_BHTK, value_BHTK, valid_BT, rate=rate, bits_BHT1=bits_BHT1)

    bits_NBHT1 = None if bits_BHT1 is None else split(bits_BHT1)
    mixed_NBHTK = jax.lax.map(attend, (split(query_BHTK), bits_NBHT1))
    mixed_BHNTK = mixed_NBHTK.transpose(1, 2, 0, 3, 4)
    return mixed_BHNTK.reshape(*query_BHTK.shape[:2], -1, query_BHTK.shape[3])[:, :, :num_queries]


def flash(
    query_BHTK, key_BHTK, value_BHTK, valid_BT=None, *, by: Literal["cudnn", "xla"] = "cudnn"
):
    """The same by one of the implementations of `jax.nn.dot_product_attention`.

    It is given lengths also where all frames are valid: without them cuDNN's gradients are not
    numbers for some T (NVIDIA/cudnn-frontend, issues 160 and 1072).
    """
    query, key, value = (x_BHTK.swapaxes(1, 2) for x_BHTK in (query_BHTK, key_BHTK, value_BHTK))
    if valid_BT is None:
        valid_BT = jnp.ones(query.shape[:2], bool)
    lengths_B = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
    mixed_BTHK = jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths_B, implementation=by
    )
    return mixed_BTHK.swapaxes(1, 2)


def _whole_blocks(key_BHTK, value_BHTK, valid_BT, block: int = 64):
    """With frames that are not valid, up to a multiple of `block`.

    XLA on CPU sums a product over the head's width in an order that depends on how many keys there
    are; not so for multiples of 64. So padding changes no bit of an utterance's features.
    """
    missing = -valid_BT.shape[1] % block
    around = ((0, 0), (0, 0), (0, missing), (0, 0))
    valid_BT = jnp.pad(valid_BT, ((0, 0), (0, missing)))
    return jnp.pad(key_BHTK, around), jnp.pad(value_BHTK, around), valid_BT
