# SPDX-License-Identifier: Apache-2.0
"""fairseq's HuBERT: pretraining checkpoints and models fine-tuned with CTC, as .pt files.

    model.pt           {"cfg", "model", ...}; from before fairseq's hydra configs, "args" for "cfg"
    dict.LABELS.txt    beside what we write, one for every label set: "<symbol> <count>" lines

The table of codes has four specials (<s> <pad> </s> <unk>) before the clusters, and the clusters
stand in the order of the dictionary. Ours has the clusters alone, in their own order. Needs torch;
fairseq itself is not needed. Source: fairseq 0.12.2, models/hubert and checkpoint_utils.
"""

import ast
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from hubert_jax import logs
from hubert_jax.data import cards
from hubert_jax.heads import CtcConfig, HeadConfig, Weights
from hubert_jax.interchange import names, shapes, tensors
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
FINE_TUNED = "w2v_encoder."

# Our fields and the keys of cfg.model.
FIELDS = {
    "conv_bias": "conv_bias",
    "width": "encoder_embed_dim",
    "ffn_width": "encoder_ffn_embed_dim",
    "num_heads": "encoder_attention_heads",
    "num_layers": "encoder_layers",
    "pre_norm": "layer_norm_first",
    "position_kernel": "conv_pos",
    "position_groups": "conv_pos_groups",
    "input_dropout": "dropout_input",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "layer_drop": "encoder_layerdrop",
    "gradient_scale": "feature_grad_mult",
    "mask_prob": "mask_prob",
    "mask_length": "mask_length",
}
CONV_NORMS = {"default": "group", "layer_norm": "layer"}  # extractor_mode
# What our model does in one way only; fairseq's own defaults.
FIXED: dict[str, Any] = {
    "activation_fn": "gelu",
    "target_glu": False,
    "layer_type": "transformer",
    "pos_conv_depth": 1,
    "conv_pos_batch_norm": False,
}


def read(path: epath.PathLike, *, num_heads: int | None = None) -> Weights:
    """A pretraining or CTC model from a .pt file, or from a folder that `write` made.

    Raises ValueError naming the key or the tensors that do not fit, FileNotFoundError, and
    ImportError without torch.
    """
    path = epath.Path(path)
    path = path / "model.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    contents = tensors.load_pt(path)
    if not isinstance(contents, Mapping) or "model" not in contents:
        raise ValueError(f"{path}: no fairseq checkpoint: it has no 'model'")
    state = tensors.state_dict(contents["model"], origin=str(path))
    try:
        settings = tensors.plain(contents.get("cfg") or contents.get("args") or {})
        dictionaries = _dictionaries(tensors.plain(contents.get("task_state") or {}))
    except RecursionError as error:
        raise ValueError(f"{path}: cfg, args or task_state hold an object within itself") from error
    is_fine_tuned = any(name.startswith(FINE_TUNED) for name in state)
    is_layer_norm = any(
        name.endswith("feature_extractor.conv_layers.1.2.1.weight") for name in state
    )
    table = table_for("layer" if is_layer_norm else "group", is_fine_tuned=is_fine_tuned)
    try:
        return _read(state, settings, dictionaries, table, path, num_heads)
    except KeyError as error:
        raise ValueError(f"{path}: no HuBERT of fairseq: it has no {error.args[0]}") from error


def _read(
    state: dict[str, np.ndarray],
    settings: dict[str, Any],
    dictionaries: list[list[str]],
    table: names.Table,
    path: epath.Path,
    num_heads: int | None,
) -> Weights:
    head: HeadConfig | None = None
    num_codes: tuple[int, ...] = ()
    ctc: CtcConfig | None = None
    codes = table["head.codes_CE"]
    task, model = _sections(settings)
    if f"{table['ctc']}.weight" in state:
        num_symbols = len(state[f"{table['ctc']}.weight"])
        ctc = CtcConfig(tuple(_symbols(dictionaries, num_symbols, task, path)), 0)
        if codes in state:  # left over: fairseq removes the projection that goes with it
            logs.info(f"{path}: {codes} of the pretraining is left out, its projection is gone")
            del state[codes]
        outer_task = task
        task, model = _sections(model.get("w2v_args") or {})
        task = {"normalize": outer_task.get("normalize")} | task
    config = _config(state, table, task, model, path, num_heads)
    if ctc is None:
        symbols = dictionaries or _written_dictionaries(task, len(state[codes]), path)
        state[codes], num_codes = _clusters(state[codes], symbols, path)
        untied = bool(model.get("untie_final_proj", False)) and len(num_codes) > 1
        code_width = len(state[table["head"] + ".weight"]) // (len(num_codes) if untied else 1)
        head = HeadConfig(code_width, float(model.get("logit_temp", 0.1)), untied, "uniform")
    weights = Weights(config, head, num_codes, ctc, {})
    return weights._replace(arrays=names.to_ours(state, weights.shapes(), table, origin=str(path)))


def write(model: Weights, folder: epath.PathLike) -> None:
    """model.pt and its dictionaries, for fairseq's load_model_ensemble_and_task.

    fairseq looks for the dictionaries in the folder where they were written; where that has moved,
    it wants arg_overrides={"data": FOLDER}. Raises ValueError for what fairseq cannot hold.
    """
    folder = epath.Path(folder)
    if bool(model.head) == bool(model.ctc):
        raise ValueError(
            "fairseq's models have a code prediction or a CTC output, this one has"
            f" {'both' if model.head else 'neither: export it as hf or torchaudio'}"
        )
    table = table_for(model.config.conv_norm, is_fine_tuned=model.ctc is not None)
    state = names.to_theirs(model.arrays, table, spelling=names.OLD_SPELLING)
    if model.ctc:
        if set(model.ctc.symbols[:4]) != set(SPECIALS) or model.ctc.blank:
            raise ValueError(
                f"fairseq's symbols start with {' '.join(SPECIALS)}, the first being the blank;"
                f" this model's are {' '.join(model.ctc.symbols[:5])} ..., the blank"
                f" {model.ctc.symbols[model.ctc.blank]}"
            )
        dictionaries = {"ltr": model.ctc.symbols[len(SPECIALS) :]}
    else:
        codes = table["head.codes_CE"]
        state[codes] = _with_specials(state[codes], model.num_codes)
        dictionaries = {
            label: tuple(map(str, range(num)))
            for label, num in zip(_label_names(model.num_codes), model.num_codes, strict=True)
        }
    path = folder / "model.pt"
    contents = {
        "cfg": _cfg(model, os.path.abspath(folder)),
        "model": tensors.to_torch(state, path),
        # fairseq reads these keys; it takes a missing lr_scheduler_state for a file of 2018
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}],
        "extra_state": {},
    }
    if model.ctc:  # "no dictionaries" spares the codes of the pretraining
        contents["task_state"] = {"dictionaries": [None]}
    for label, symbols in dictionaries.items():
        _write_dictionary(folder / f"dict.{label}.txt", symbols)
    tensors.save_pt(path, contents)


def table_for(conv_norm: str, *, is_fine_tuned: bool) -> names.Table:
    """The names in a pretraining checkpoint, or in one fine-tuned with CTC."""
    table = dict(names.FAIRSEQ)
    if conv_norm == "layer":  # within a module that swaps the axes before and after
        table["encoder.extractor.norms.{i}"] += ".1"
    if is_fine_tuned:
        return names.within(names.within(table, "w2v_model.", but=("ctc",)), FINE_TUNED)
    return table


# cfg.


def _sections(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """cfg.task and cfg.model; older files have all keys in one."""
    if isinstance(settings.get("model"), dict):
        return settings["task"], settings["model"]
    return settings, settings


def _config(
    state: Mapping[str, np.ndarray],
    table: names.Table,
    task: dict[str, Any],
    model: dict[str, Any],
    path: epath.Path,
    num_heads: int | None,
) -> HubertConfig:
    """What the file says; a fine-tuned one may say nothing of the encoder, then shapes do."""
    for key, wanted in FIXED.items():
        if model.get(key, wanted) != wanted:
            raise ValueError(f"{path}: {key} is {model[key]!r}; this model knows {wanted!r} only")
    told = {ours: model[theirs] for ours, theirs in FIELDS.items() if theirs in model}
    if "extractor_mode" in model:
        if model["extractor_mode"] not in CONV_NORMS:
            raise ValueError(
                f"{path}: extractor_mode is {model['extractor_mode']!r}; this model knows"
                f" {' and '.join(CONV_NORMS)} only"
            )
        told["conv_norm"] = CONV_NORMS[model["extractor_mode"]]
    if task.get("normalize") is not None:
        told["normalize_audio"] = bool(task["normalize"])
    config = shapes.config(state, table, told, num_heads=num_heads, origin=path)
    layers = _conv_layers(config.conv_width)
    if "conv_feature_layers" in model and _written_out(model["conv_feature_layers"]) != layers:
        raise ValueError(
            f"{path}: conv_feature_layers is {model['conv_feature_layers']}, ours are {layers}"
        )
    return config


def _cfg(model: Weights, data: str) -> dict[str, Any]:
    config = model.config
    task = {
        "_name": "hubert_pretraining", "data": data, "label_dir": None, "label_rate": 50.0,
        "labels": _label_names(model.num_codes), "sample_rate": frames.SAMPLE_RATE,
        "normalize": config.normalize_audio,
    }  # fmt: skip
    encoder = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | {
        "_name": "hubert",
        "label_rate": 50.0,
        "extractor_mode": {ours: mode for mode, ours in CONV_NORMS.items()}[config.conv_norm],
        "conv_feature_layers": _conv_layers(config.conv_width),
    }
    if model.head:
        encoder |= {
            "final_dim": model.head.code_width,
            "untie_final_proj": model.head.untied,
            "logit_temp": model.head.temperature,
        }
        return {"task": task, "model": encoder}
    pretraining = {"task": task | {"labels": []}, "model": encoder}
    return {
        "task": task | {"labels": ["ltr"], "fine_tuning": True, "single_target": True},
        "model": {
            "_name": "hubert_ctc", "data": data, "normalize": config.normalize_audio,
            "w2v_args": pretraining,
        },
    }  # fmt: skip


def _conv_layers(width: int) -> str:
    return " + ".join(f"[({width},{kernel},{stride})]" for kernel, stride in frames.CONV_LAYERS)


def _written_out(conv_layers: str) -> str:
    """fairseq's "[(512,10,5)] + [(512,3,2)] * 4", which it evaluates as Python, term by term."""
    terms = []
    for term in conv_layers.replace(" ", "").split("+"):
        layer, _, times = term.partition("*")
        terms += [layer] * int(times or 1)
    return " + ".join(terms)


# Dictionaries and the table of codes.


def _dictionaries(task_state: Any) -> list[list[str]]:
    """The symbols of every pickled dictionary, specials included: of CTC, or of the clusters."""
    target = task_state.get("target_dictionary")
    found = [target] if target else task_state.get("dictionaries") or []
    return [one["symbols"] for one in found if one]


def _written_dictionaries(task: dict[str, Any], num_rows: int, path: epath.Path) -> list[list[str]]:
    """From the files beside the checkpoint; a single label set's can be told from the rows."""
    labels = _label_list(task.get("labels"), path)
    files = [path.parent / f"dict.{label}.txt" for label in labels]
    if files and all(file.exists() for file in files):
        return [[*SPECIALS, *_read_dictionary(file)] for file in files]
    if len(labels) > 1:
        raise ValueError(
            f"{path}: {len(labels)} label sets share {num_rows} codes; put"
            f" {', '.join(file.name for file in files)} beside it, which say how many each has"
        )
    return [[*SPECIALS, *map(str, range(num_rows - len(SPECIALS)))]]


def _symbols(
    dictionaries: list[list[str]], num_symbols: int, task: dict[str, Any], path: epath.Path
) -> list[str]:
    """Of CTC; by number where neither the checkpoint nor a file beside it says them."""
    files = [path.parent / f"dict.{label}.txt" for label in _label_list(task.get("labels"), path)]
    if dictionaries:
        found = dictionaries[0]
    elif files and files[0].exists():
        found = [*SPECIALS, *_read_dictionary(files[0])]
    else:
        logs.info(f"{path}: no dictionary; the {num_symbols} symbols are called by their numbers")
        found = [f"#{i}" for i in range(num_symbols)]
    if len(found) != num_symbols:
        raise ValueError(f"{path}: {num_symbols} outputs, but {len(found)} symbols in dictionary")
    return found


def _clusters(
    codes_RE: np.ndarray, dictionaries: list[list[str]], path: epath.Path
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The embeddings of the clusters alone, in the clusters' order, and how many each set has."""
    num_rows = sum(map(len, dictionaries))
    if num_rows != len(codes_RE):
        raise ValueError(f"{path}: {len(codes_RE)} code embeddings for {num_rows} symbols")
    rows, start = [], 0
    for symbols in dictionaries:
        clusters = symbols[len(SPECIALS) :]
        if sorted(clusters) != sorted(map(str, range(len(clusters)))):
            raise ValueError(
                f"{path}: the dictionary's symbols are {' '.join(clusters[:5])} ..., but"
                f" {len(clusters)} clusters are called 0 to {len(clusters) - 1}"
            )
        row_of = {symbol: row for row, symbol in enumerate(symbols)}
        rows += [start + row_of[str(code)] for code in range(len(clusters))]
        start += len(symbols)
    return codes_RE[rows], tuple(len(symbols) - len(SPECIALS) for symbols in dictionaries)


def _with_specials(codes_CE: np.ndarray, num_codes: Sequence[int]) -> np.ndarray:
    """Four rows before each label set, which point away from its codes.

    fairseq counts the specials among the wrong answers. Opposite to the mean of the codes they
    weigh least; rows of zeros would have an endless gradient under the cosine.
    """
    parts = []
    for codes in np.split(codes_CE, np.cumsum(num_codes)[:-1]):
        lengths = np.linalg.norm(codes, axis=1, keepdims=True)
        away = -np.mean(codes / np.maximum(lengths, 1e-8), axis=0, keepdims=True)
        parts += [np.repeat(away, len(SPECIALS), axis=0), codes]
    return np.concatenate(parts).astype(np.float32)


def _label_names(num_codes: Sequence[int]) -> list[str]:
    return ["km"] if len(num_codes) == 1 else [f"km{i}" for i in range(len(num_codes))]


def _label_list(labels: Any, path: epath.Path) -> list[str]:
    """task.labels; older files hold the list as a string, "['km']"."""
    try:
        found = ast.literal_eval(labels) if isinstance(labels, str) else labels or []
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # its own list
        found = None
    if not isinstance(found, list | tuple) or not all(isinstance(label, str) for label in found):
        raise ValueError(f"{path}: task.labels is {labels!r}; a list such as ['km'] is wanted")
    return list(found)


def _read_dictionary(path: epath.Path) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in path.read_text().splitlines() if line]


def _write_dictionary(path: epath.Path, symbols: Sequence[str]) -> None:
    with cards.whole(path) as unfinished:
        unfinished.write_text("".join(f"{symbol} 1\n" for symbol in symbols))
