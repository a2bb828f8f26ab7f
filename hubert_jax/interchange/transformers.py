# SPDX-License-Identifier: Apache-2.0
"""transformers' HubertModel and HubertForCTC: a folder as save_pretrained writes it.

    config.json                      the architecture; ours adds a section "hubert_jax" with what
                                     transformers has no field for
    model.safetensors                or shards with an index, or pytorch_model.bin (needs torch)
    preprocessor_config.json         whether waveforms are normalised; since 5.0, a processor keeps
                                     this in processor_config.json
    vocab.json                       HubertForCTC's symbols
    pretraining_head.safetensors     ours: the code prediction under fairseq's names, for which
                                     transformers has no place; it does not look at this file

transformers itself is not needed. Source: its models/hubert, 5.24, and files that 4.x wrote.
"""

import dataclasses
import json
from typing import Any

from etils import epath

from hubert_jax import logs
from hubert_jax.data import cards
from hubert_jax.heads import CtcConfig, HeadConfig, Weights
from hubert_jax.interchange import names, shapes, tensors
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames

HEAD_FILE = "pretraining_head.safetensors"
WEIGHT_FILES = (  # in the order that transformers looks for them
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
PROCESSORS = ("processor", "preprocessor")  # in the order that transformers looks for them

# Our fields of HubertConfig and the keys of config.json.
FIELDS = {
    "conv_norm": "feat_extract_norm",
    "conv_bias": "conv_bias",
    "width": "hidden_size",
    "ffn_width": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "pre_norm": "do_stable_layer_norm",
    "position_kernel": "num_conv_pos_embeddings",
    "position_groups": "num_conv_pos_embedding_groups",
    "input_dropout": "feat_proj_dropout",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "layer_drop": "layerdrop",
}
# What our model does in one way only. Files of 4.x lack some of these keys.
FIXED: dict[str, Any] = {
    "model_type": "hubert",
    "num_feat_extract_layers": len(frames.CONV_LAYERS),
    "conv_kernel": [kernel for kernel, _ in frames.CONV_LAYERS],
    "conv_stride": [stride for _, stride in frames.CONV_LAYERS],
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "layer_norm_eps": 1e-5,
}


def read(folder: epath.PathLike) -> Weights:
    """A model, with its head where there is one.

    Raises ValueError naming the key or the tensors that do not fit, FileNotFoundError.
    """
    folder = epath.Path(folder)
    config = _read_json(folder / "config.json")
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: has none of {', '.join(WEIGHT_FILES)}")
    state = tensors.read(path)
    head, num_codes = _head(config, folder)
    ctc = None
    if "lm_head.weight" in state:
        blank = config.get("pad_token_id", 0)  # transformers' own default
        ctc = _ctc(folder, num_symbols=len(state["lm_head.weight"]), blank=blank)
    model = Weights(_to_ours(config, folder), head, num_codes, ctc, {})
    is_inside = any(name.startswith("hubert.") for name in state)  # of HubertForCTC and its like
    table = _table(model, prefix="hubert." if is_inside else "")
    if head:
        state |= tensors.read(folder / HEAD_FILE)
    names.add_mask_embedding(state, table, width=model.config.width, origin=str(path))
    return model._replace(arrays=names.to_ours(state, model.shapes(), table, origin=str(path)))


def write(model: Weights, folder: epath.PathLike) -> None:
    """A folder for `HubertModel.from_pretrained` and `AutoFeatureExtractor.from_pretrained`."""
    folder = epath.Path(folder)
    table = _table(model, prefix="hubert." if model.ctc else "")
    of_head = {name: x for name, x in model.arrays.items() if name.startswith("head.")}
    others = {name: x for name, x in model.arrays.items() if name not in of_head}
    spelling = names.NEW_SPELLING
    for file, arrays in (("model.safetensors", others), (HEAD_FILE, of_head)):
        if arrays:
            tensors.write(folder / file, names.to_theirs(arrays, table, spelling=spelling))
    if model.ctc:
        vocabulary = {symbol: i for i, symbol in enumerate(model.ctc.symbols)}
        _write_json(folder / "vocab.json", vocabulary)
        blank = model.ctc.symbols[model.ctc.blank]
        tokenizer = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": blank}
        _write_json(folder / "tokenizer_config.json", tokenizer)
    _write_json(folder / "preprocessor_config.json", _preprocessor(model.config))
    _write_json(folder / "config.json", _to_theirs(model))


def _table(model: Weights, *, prefix: str) -> dict[str, str]:
    """Their names of everything this model has; the head's are those of its own file."""
    table = names.within(names.TRANSFORMERS, prefix, but=("ctc",))
    if model.head:
        table |= {name: names.FAIRSEQ[name] for name in ("head", "head.codes_CE")}
    return table


# config.json and its neighbours.


def _to_ours(config: dict[str, Any], folder: epath.Path) -> HubertConfig:
    for key, wanted in FIXED.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {config[key]!r}; this model knows"
                f" {wanted!r} only"
            )
    missing = [key for key in (*FIELDS.values(), "conv_dim") if key not in config]
    if missing or len(set(config["conv_dim"])) != 1:
        what = f"lacks {', '.join(missing)}" if missing else f"conv_dim is {config['conv_dim']}"
        raise ValueError(f"{folder / 'config.json'}: {what}; seven equal conv_dim are wanted")
    fields = {ours: config[theirs] for ours, theirs in FIELDS.items()}
    kept = config.get("hubert_jax", {})
    others = {
        name: kept.get(name, value)
        for name, value in shapes.usual(fields["conv_norm"]).items()
        if name not in fields
    }
    extractor = _extractor(folder)
    if extractor is not None:  # transformers' own default is to normalise
        others["normalize_audio"] = bool(extractor.get("do_normalize", True))
    else:
        logs.info(
            f"{folder}: no preprocessor_config.json: waveforms are taken to be"
            f" {'' if others['normalize_audio'] else 'not '}normalised, as in the published model"
            " of this kind"
        )
    return HubertConfig(conv_width=config["conv_dim"][0], **fields, **others)


def _to_theirs(model: Weights) -> dict[str, Any]:
    fields = dataclasses.asdict(model.config)
    config = {theirs: fields.pop(ours) for ours, theirs in FIELDS.items()}
    config |= FIXED
    config |= {
        "architectures": ["HubertForCTC" if model.ctc else "HubertModel"],
        "dtype": "float32",
        "conv_dim": [fields.pop("conv_width")] * len(frames.CONV_LAYERS),
        "hubert_jax": fields,
    }
    if model.head:
        config["hubert_jax"] |= {
            "head": dataclasses.asdict(model.head),
            "num_codes": list(model.num_codes),
        }
    if model.ctc:
        config |= {"vocab_size": len(model.ctc.symbols), "pad_token_id": model.ctc.blank}
    return config


def _extractor(folder: epath.Path) -> dict[str, Any] | None:
    """The settings of the feature extractor, from the file that transformers prefers."""
    processor, preprocessor = (folder / f"{name}_config.json" for name in PROCESSORS)
    if processor.exists() and "feature_extractor" in (found := _read_json(processor)):
        return found["feature_extractor"]
    return _read_json(preprocessor) if preprocessor.exists() else None


def _preprocessor(config: HubertConfig) -> dict[str, Any]:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": frames.SAMPLE_RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": config.normalize_audio,
        # what transformers ships: base was trained without a mask of the padding
        "return_attention_mask": config.conv_norm == "layer",
    }


def _head(config: dict[str, Any], folder: epath.Path) -> tuple[HeadConfig | None, tuple[int, ...]]:
    if not (folder / HEAD_FILE).exists():
        return None, ()
    ours = config.get("hubert_jax", {})
    if "head" not in ours:
        raise ValueError(
            f"{folder / HEAD_FILE} is here, but config.json has no section hubert_jax.head to say"
            " how it is built: remove that file to import the encoder alone"
        )
    return HeadConfig(**ours["head"]), tuple(ours["num_codes"])


def _ctc(folder: epath.Path, *, num_symbols: int, blank: int) -> CtcConfig:
    if blank not in range(num_symbols):
        raise ValueError(
            f"{folder / 'config.json'}: pad_token_id, the blank, is {blank}; there are"
            f" {num_symbols} symbols"
        )
    path = folder / "vocab.json"
    if not path.exists():
        logs.info(f"{folder}: no vocab.json; the {num_symbols} symbols are called by their numbers")
        return CtcConfig(tuple(f"#{i}" for i in range(num_symbols)), blank)
    numbers = _read_json(path)
    for symbol, number in numbers.items():
        if type(number) is not int:
            raise ValueError(
                f"{path}: {symbol!r} is {number!r}; symbols and their whole numbers are wanted"
            )
    by_number = {number: symbol for symbol, number in numbers.items()}
    return CtcConfig(tuple(by_number.get(i, f"#{i}") for i in range(num_symbols)), blank)


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: missing; is this a folder of save_pretrained?") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: an object is wanted, not {type(contents).__name__}")
    return contents


def _write_json(path: epath.Path, contents: dict[str, Any]) -> None:
    with cards.whole(path) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False))
