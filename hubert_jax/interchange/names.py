# SPDX-License-Identifier: Apache-2.0
"""Our arrays <-> the tensors of transformers, fairseq and torchaudio: one table per format.

A table says what each of our modules is called there. Both directions read it, and what is told of
a tensor (which part of which array, laid out how) holds for all formats, because all are torch.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from hubert_jax import logs

Table = Mapping[str, str]  # our module or array -> theirs, {i} being the layer or convolution

TRANSFORMERS: Table = {
    "encoder.extractor.convs.{i}": "feature_extractor.conv_layers.{i}.conv",
    "encoder.extractor.norms.{i}": "feature_extractor.conv_layers.{i}.layer_norm",
    "encoder.projection_norm": "feature_projection.layer_norm",
    "encoder.projection": "feature_projection.projection",
    "encoder.mask_embedding_D": "masked_spec_embed",
    "encoder.position": "encoder.pos_conv_embed.conv",
    "encoder.norm": "encoder.layer_norm",
    "encoder.layers.attention.q": "encoder.layers.{i}.attention.q_proj",
    "encoder.layers.attention.k": "encoder.layers.{i}.attention.k_proj",
    "encoder.layers.attention.v": "encoder.layers.{i}.attention.v_proj",
    "encoder.layers.attention.out": "encoder.layers.{i}.attention.out_proj",
    "encoder.layers.attention_norm": "encoder.layers.{i}.layer_norm",
    "encoder.layers.ffn_in": "encoder.layers.{i}.feed_forward.intermediate_dense",
    "encoder.layers.ffn_out": "encoder.layers.{i}.feed_forward.output_dense",
    "encoder.layers.ffn_norm": "encoder.layers.{i}.final_layer_norm",
    "ctc": "lm_head",
}

FAIRSEQ: Table = {
    "encoder.extractor.convs.{i}": "feature_extractor.conv_layers.{i}.0",
    "encoder.extractor.norms.{i}": "feature_extractor.conv_layers.{i}.2",
    "encoder.projection_norm": "layer_norm",
    "encoder.projection": "post_extract_proj",
    "encoder.mask_embedding_D": "mask_emb",
    "encoder.position": "encoder.pos_conv.0",
    "encoder.norm": "encoder.layer_norm",
    "encoder.layers.attention.q": "encoder.layers.{i}.self_attn.q_proj",
    "encoder.layers.attention.k": "encoder.layers.{i}.self_attn.k_proj",
    "encoder.layers.attention.v": "encoder.layers.{i}.self_attn.v_proj",
    "encoder.layers.attention.out": "encoder.layers.{i}.self_attn.out_proj",
    "encoder.layers.attention_norm": "encoder.layers.{i}.self_attn_layer_norm",
    "encoder.layers.ffn_in": "encoder.layers.{i}.fc1",
    "encoder.layers.ffn_out": "encoder.layers.{i}.fc2",
    "encoder.layers.ffn_norm": "encoder.layers.{i}.final_layer_norm",
    "head": "final_proj",
    "head.codes_CE": "label_embs_concat",
    "ctc": "proj",
}

TORCHAUDIO: Table = {
    "encoder.extractor.convs.{i}": "feature_extractor.conv_layers.{i}.conv",
    "encoder.extractor.norms.{i}": "feature_extractor.conv_layers.{i}.layer_norm",
    "encoder.projection_norm": "encoder.feature_projection.layer_norm",
    "encoder.projection": "encoder.feature_projection.projection",
    "encoder.mask_embedding_D": "mask_generator.mask_embedding",
    "encoder.position": "encoder.transformer.pos_conv_embed.conv",
    "encoder.norm": "encoder.transformer.layer_norm",
    "encoder.layers.attention.q": "encoder.transformer.layers.{i}.attention.q_proj",
    "encoder.layers.attention.k": "encoder.transformer.layers.{i}.attention.k_proj",
    "encoder.layers.attention.v": "encoder.transformer.layers.{i}.attention.v_proj",
    "encoder.layers.attention.out": "encoder.transformer.layers.{i}.attention.out_proj",
    "encoder.layers.attention_norm": "encoder.transformer.layers.{i}.layer_norm",
    "encoder.layers.ffn_in": "encoder.transformer.layers.{i}.feed_forward.intermediate_dense",
    "encoder.layers.ffn_out": "encoder.transformer.layers.{i}.feed_forward.output_dense",
    "encoder.layers.ffn_norm": "encoder.transformer.layers.{i}.final_layer_norm",
    "head": "logit_generator.final_proj",
    "head.codes_CE": "logit_generator.label_embeddings",
    "ctc": "aux",
}

# The position convolution's weight norm, as torch wrote it before 2.1 and as it does since.
OLD_SPELLING = ("weight_g", "weight_v")
NEW_SPELLING = ("parametrizations.weight.original0", "parametrizations.weight.original1")


def within(table: Table, prefix: str, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """The table of a model that holds another one under `prefix`; entries `but` stay outside."""
    return {ours: theirs if ours in but else prefix + theirs for ours, theirs in table.items()}


def to_theirs(
    arrays: Mapping[str, np.ndarray], table: Table, *, spelling: tuple[str, str]
) -> dict[str, np.ndarray]:
    """A torch state dict of a model's arrays; the parts of an array that layers share are views.

    Raises ValueError when the format has no place for an array.
    """
    homeless = [name for name in arrays if not any(_parts(name, arrays[name].shape, table))]
    if homeless:
        raise ValueError(f"this format has no place for {_listed(homeless)}")
    return {
        _spelled(part.theirs, spelling): part.layout.to_torch(arrays[name][part.index])
        for name in arrays
        for part in _parts(name, arrays[name].shape, table)
    }


def to_ours(
    state: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    table: Table,
    *,
    origin: str,
) -> dict[str, np.ndarray]:
    """Our arrays, float32 of `shapes`, out of a torch state dict in either spelling.

    Raises ValueError with every tensor that is missing, unused, of another shape or no floats.
    """
    state = respelled(state, OLD_SPELLING)
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    missing, misshaped, used = [], [], set()
    no_floats = [f"{name} {x.dtype}" for name, x in state.items() if x.dtype.kind != "f"]
    for name, array in arrays.items():
        for part in _parts(name, array.shape, table):
            used.add(part.theirs)
            if part.theirs not in state:
                missing.append(part.theirs)
                continue
            tensor, place = state[part.theirs], array[part.index]
            wanted = part.layout.to_torch(place).shape
            if tensor.shape != wanted:
                misshaped.append(f"{part.theirs} {tensor.shape} instead of {wanted}")
                continue
            array[part.index] = part.layout.from_torch(tensor, place.shape)
    unused = sorted(state.keys() - used)
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unused", unused),
            ("of another shape", misshaped),
            ("no floats", no_floats),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{origin} does not hold the model that it describes; " + "; ".join(problems)
        )
    return arrays


def add_mask_embedding(
    state: dict[str, np.ndarray], table: Table, *, width: int, origin: str
) -> None:
    """Draws one, U(0, 1) and always the same, where a model that is never masked has none."""
    name = table["encoder.mask_embedding_D"]
    if name not in state:
        state[name] = np.random.default_rng(0).uniform(size=width).astype(np.float32)
        logs.info(f"{origin}: has no mask embedding ({name}); a new one is drawn")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


# Parts: which tensor is which part of which array.


class Layout(NamedTuple):
    """How a part of one of our arrays lies in torch, and how it comes back into a shape."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _linear(num_inputs: int) -> Layout:
    """Ours (in..., out...), theirs (out, in)."""

    def to_torch(x):
        fan_in = int(np.prod(x.shape[:num_inputs]))
        return x.reshape(fan_in, -1).T

    return Layout(to_torch, lambda y, shape: y.T.reshape(shape))


FLAT = Layout(lambda x: x.reshape(-1), lambda y, shape: y.reshape(shape))
SAME = Layout(lambda x: x, lambda y, shape: y)
CONV = Layout(lambda x: x.transpose(2, 1, 0), lambda y, shape: y.transpose(2, 1, 0))
GAIN = Layout(lambda x: x.reshape(1, 1, -1), lambda y, shape: y.reshape(shape))  # per tap
PROJECTIONS = (
    Layout(  # ours (label sets, width, code width), theirs (label sets x code width, width)
        lambda x: x.transpose(0, 2, 1).reshape(-1, x.shape[1]),
        lambda y, shape: y.reshape(shape[0], shape[2], shape[1]).transpose(0, 2, 1),
    )
)


@dataclasses.dataclass(frozen=True)
class Part:
    index: tuple  # into our array
    theirs: str  # in the old spelling of weight norm
    layout: Layout


def _parts(name: str, shape: tuple[int, ...], table: Table) -> Iterator[Part]:
    """The tensors that one of our arrays is made of; none where the format has no such thing."""
    module, _, leaf = name.rpartition(".")
    if name in table:  # an array of its own
        yield Part((), table[name], SAME)
    elif module == "encoder.position":
        theirs, layout = {
            "kernel": ("weight_v", CONV),
            "gain_P": ("weight_g", GAIN),
            "bias": ("bias", FLAT),
        }[leaf]
        yield Part((), f"{table[module]}.{theirs}", layout)
    elif match := re.fullmatch(r"(encoder\.extractor\.\w+)\.(\d+)", module):
        theirs = table[match[1] + ".{i}"].format(i=match[2])
        yield Part((), f"{theirs}.{_leaf(leaf)}", CONV if leaf == "kernel" else FLAT)
    elif module == "encoder.layers.attention.qkv":
        for i in range(shape[0]):
            for j, letter in enumerate("qkv"):
                theirs = table[f"encoder.layers.attention.{letter}"].format(i=i)
                index = (i, slice(None), j) if leaf == "kernel" else (i, j)
                yield Part(
                    index, f"{theirs}.{_leaf(leaf)}", _linear(1) if leaf == "kernel" else FLAT
                )
    elif module in table and module.startswith("encoder.layers."):
        num_inputs = 2 if module == "encoder.layers.attention.out" else 1
        for i in range(shape[0]):
            layout = _linear(num_inputs) if leaf == "kernel" else FLAT
            yield Part((i,), f"{table[module].format(i=i)}.{_leaf(leaf)}", layout)
    elif module in table:
        matrix = PROJECTIONS if module == "head" else _linear(1)
        yield Part((), f"{table[module]}.{_leaf(leaf)}", matrix if leaf == "kernel" else FLAT)


def _leaf(ours: str) -> str:
    return {"kernel": "weight", "scale": "weight", "bias": "bias"}[ours]


def respelled(state: Mapping[str, np.ndarray], spelling: tuple[str, str]) -> dict[str, np.ndarray]:
    """The same tensors with weight norm in one spelling. Raises ValueError if it is in both."""
    new = {_spelled(name, spelling): tensor for name, tensor in state.items()}
    if len(new) < len(state):
        twice = sorted(name for name in state if name != _spelled(name, spelling))
        raise ValueError(f"weight norm is there in both spellings: remove {_listed(twice)}")
    return new


def _spelled(name: str, spelling: tuple[str, str]) -> str:
    for pair in (OLD_SPELLING, NEW_SPELLING):
        for suffix, wanted in zip(pair, spelling, strict=True):
            if name.endswith("." + suffix):
                return name.removesuffix(suffix) + wanted
    return name
