# SPDX-License-Identifier: Apache-2.0
"""torchaudio's HuBERT: the state dict of hubert_pretrain_model(...), or of the bare wav2vec2_model.

    model.safetensors   or model.pt (needs torch)
    torchaudio.json     which function of torchaudio.models makes the model, and its arguments; a
                        section "hubert_jax" with what torchaudio has no argument for

A state dict from elsewhere comes without the second file. Shapes then tell the architecture but for
the number of heads, which is known for the published widths; the dropouts are those of torchaudio's
own hubert_pretrain_base and _large (shapes.py). Where a bundle (HUBERT_LARGE, HUBERT_ASR_LARGE)
wraps the model to normalise waveforms, its names begin with "model.". torchaudio is not needed.

Source: torchaudio 2.11, models/wav2vec2.
"""

import json
from typing import Any

from etils import epath

from hubert_jax.data import cards
from hubert_jax.heads import CtcConfig, HeadConfig, Weights
from hubert_jax.interchange import names, shapes, tensors
from hubert_jax.ops import frames

ARGUMENTS = "torchaudio.json"
TEMPERATURE = 0.1  # torchaudio's, fixed
WRAPPED = "model."
OUTSIDE = ("encoder.mask_embedding_D", "head", "head.codes_CE")  # of its wav2vec2

# Our fields and torchaudio's arguments.
FIELDS = {
    "conv_bias": "extractor_conv_bias",
    "width": "encoder_embed_dim",
    "ffn_width": "encoder_ff_interm_features",
    "num_heads": "encoder_num_heads",
    "num_layers": "encoder_num_layers",
    "pre_norm": "encoder_layer_norm_first",
    "position_kernel": "encoder_pos_conv_kernel",
    "position_groups": "encoder_pos_conv_groups",
    "input_dropout": "encoder_projection_dropout",
    "dropout": "encoder_dropout",
    "attention_dropout": "encoder_attention_dropout",
    "activation_dropout": "encoder_ff_interm_dropout",
    "layer_drop": "encoder_layer_drop",
}
# Arguments of hubert_pretrain_model alone.
PRETRAINING_FIELDS = {
    "mask_prob": "mask_prob",
    "mask_length": "mask_length",
    "gradient_scale": "feature_grad_mult",  # None for 1
}
# And what our model does in one way only.
MASKING: dict[str, Any] = {
    "mask_selection": "static",
    "mask_other": 0.0,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "mask_channel_length": 10,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "skip_masked": False,
    "skip_nomask": False,
}


def read(path: epath.PathLike, *, num_heads: int | None = None) -> Weights:
    """A model from a state dict's file, or from a folder that `write` made.

    Raises ValueError naming what does not fit, FileNotFoundError.
    """
    path = epath.Path(path)
    if path.is_dir():
        found = [p for p in (path / "model.safetensors", path / "model.pt") if p.exists()]
        if not found:
            raise FileNotFoundError(f"{path}: has neither model.safetensors nor model.pt")
        path = found[0]
    state = tensors.read(path)
    if all(name.startswith(WRAPPED) for name in state):
        state = {name.removeprefix(WRAPPED): tensor for name, tensor in state.items()}
    is_pretraining = any(name.startswith("wav2vec2.") for name in state)
    table = names.within(names.TORCHAUDIO, "wav2vec2." if is_pretraining else "", but=OUTSIDE)
    try:
        told, symbols = _told(path.parent / ARGUMENTS)
        config = shapes.config(state, table, told, num_heads=num_heads, origin=path)
        head: HeadConfig | None = None
        num_codes: tuple[int, ...] = ()
        ctc: CtcConfig | None = None
        if is_pretraining:
            num, code_width = state[table["head.codes_CE"]].shape
            head, num_codes = HeadConfig(code_width, TEMPERATURE, False, "uniform"), (num,)
        if f"{table['ctc']}.weight" in state:
            num_symbols = len(state[f"{table['ctc']}.weight"])
            ctc = symbols or CtcConfig(tuple(f"#{i}" for i in range(num_symbols)), 0)
    except KeyError as error:
        raise ValueError(f"{path}: no HuBERT of torchaudio: has no {error.args[0]}") from error
    names.add_mask_embedding(state, table, width=config.width, origin=str(path))
    model = Weights(config, head, num_codes, ctc, {})
    return model._replace(arrays=names.to_ours(state, model.shapes(), table, origin=str(path)))


def write(model: Weights, folder: epath.PathLike, *, suffix: str = tensors.SAFETENSORS) -> None:
    """Weights for `load_state_dict`, and the call that makes the model.

    The mask embedding goes along where there is a head: the bare model has no place for it. Raises
    ValueError for several label sets or outputs, which torchaudio does not know.
    """
    folder = epath.Path(folder)
    if model.head and model.ctc:
        raise ValueError("torchaudio holds a code prediction or a CTC output: this model has both")
    if len(model.num_codes) > 1:
        raise ValueError(f"torchaudio predicts one label set, this model {len(model.num_codes)}")
    if model.head and model.head.temperature != TEMPERATURE:
        raise ValueError(f"torchaudio's temperature is 0.1, this head's {model.head.temperature}")
    table = names.within(names.TORCHAUDIO, "wav2vec2." if model.head else "", but=OUTSIDE)
    arrays = {
        name: x
        for name, x in model.arrays.items()
        if model.head or name != "encoder.mask_embedding_D"
    }
    state = names.to_theirs(arrays, table, spelling=names.NEW_SPELLING)
    tensors.write(folder / f"model{suffix}", state)
    with cards.whole(folder / ARGUMENTS) as unfinished:
        kept = {"normalize_audio": model.config.normalize_audio, "ctc": model.facts()["ctc"]}
        unfinished.write_text(json.dumps(call(model) | {"hubert_jax": kept}, indent=2))


def call(model: Weights) -> dict[str, Any]:
    """{"function": a name in torchaudio.models, "arguments": what to give it}."""
    config = model.config
    arguments = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | {
        "extractor_mode": {"group": "group_norm", "layer": "layer_norm"}[config.conv_norm],
        "extractor_conv_layer_config": [[config.conv_width, *conv] for conv in frames.CONV_LAYERS],
    }
    if model.head is None:
        num_symbols = len(model.ctc.symbols) if model.ctc else None
        arguments |= {"aux_num_out": num_symbols}
        return {"function": "wav2vec2_model", "arguments": arguments}
    arguments |= {theirs: getattr(config, ours) for ours, theirs in PRETRAINING_FIELDS.items()}
    arguments |= MASKING | {
        "num_classes": model.num_codes[0],
        "final_dim": model.head.code_width,
        "feature_grad_mult": config.gradient_scale if config.gradient_scale < 1 else None,
    }
    return {"function": "hubert_pretrain_model", "arguments": arguments}


def _told(path: epath.Path) -> tuple[dict[str, Any], CtcConfig | None]:
    """Our fields and the symbols, as far as the file of arguments knows them."""
    if not path.exists():
        return {}, None
    try:
        contents = json.loads(path.read_text())
        arguments, kept = contents["arguments"], contents.get("hubert_jax", {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: does not say how the model is made: {error!r}") from error
    fields = FIELDS | PRETRAINING_FIELDS
    told = {ours: arguments[theirs] for ours, theirs in fields.items() if theirs in arguments}
    if "gradient_scale" in told:
        told["gradient_scale"] = told["gradient_scale"] or 1.0
    if "normalize_audio" in kept:
        told["normalize_audio"] = kept["normalize_audio"]
    ctc = kept.get("ctc")
    return told, CtcConfig(tuple(ctc["symbols"]), ctc["blank"]) if ctc else None
