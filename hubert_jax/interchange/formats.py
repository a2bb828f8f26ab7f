# SPDX-License-Identifier: Apache-2.0
"""The formats by name: `hubert import --from=NAME`, `hubert export weights --format=NAME`."""

from etils import epath

from hubert_jax.data import cards
from hubert_jax.heads import Weights
from hubert_jax.interchange import fairseq, tensors, torchaudio, transformers

NAMES = ("safetensors", "hf", "fairseq", "torchaudio")
# What `write` writes in each format, as patterns.
FILES = {
    "safetensors": ("model.safetensors",),
    "hf": (
        "config.json", "model.safetensors", transformers.HEAD_FILE, "preprocessor_config.json",
        "vocab.json", "tokenizer_config.json",
    ),
    "fairseq": ("model.pt", "dict.*.txt"),
    "torchaudio": ("model.safetensors", "model.pt", torchaudio.ARGUMENTS),
}  # fmt: skip
SUFFIXES = (tensors.SAFETENSORS, ".pt")


def read(path: epath.PathLike, *, format_: str, num_heads: int | None = None) -> Weights:
    """A model in one of the formats, under our names.

    `num_heads` is for state dicts that come without a config. Raises ValueError naming what does
    not fit, FileNotFoundError, and ImportError where a .pt file needs torch.
    """
    path = epath.Path(path)
    if format_ == "hf":
        return transformers.read(_folder(path))
    if format_ == "fairseq":
        return fairseq.read(path, num_heads=num_heads)
    if format_ == "torchaudio":
        return torchaudio.read(path, num_heads=num_heads)
    return _read_ours(_folder(path))


def write(
    model: Weights, folder: epath.PathLike, *, format_: str, suffix: str = SUFFIXES[0]
) -> None:
    """A folder of one of the formats. `suffix` chooses the kind of torchaudio's state dict.

    Raises ValueError for a model that the format cannot hold, ImportError where torch is needed.
    """
    if format_ == "hf":
        transformers.write(model, folder)
    elif format_ == "fairseq":
        fairseq.write(model, folder)
    elif format_ == "torchaudio":
        torchaudio.write(model, folder, suffix=suffix)
    else:
        tensors.write(epath.Path(folder) / "model.safetensors", model.arrays)


def summary(model: Weights) -> str:
    """'94.68 M parameters, 12 layers of width 768, 500 codes'."""
    num_parameters = sum(array.size for array in model.arrays.values())
    parts = [
        f"{num_parameters / 1e6:.2f} M parameters",
        f"{model.config.num_layers} layers of width {model.config.width}",
    ]
    parts += [f"{num} codes" for num in model.num_codes]
    parts += [f"{len(model.ctc.symbols)} CTC symbols"] if model.ctc else []
    return ", ".join(parts if model.head or model.ctc else [*parts, "no head"])


def _folder(path: epath.Path) -> epath.Path:
    """Of a format that is a folder, also where somebody named the weights in it."""
    return path.parent if path.is_file() else path


def _read_ours(folder: epath.Path) -> Weights:
    """Dotted names and layers stacked, as in a checkpoint; the card beside them says the rest."""
    card = cards.read(folder / "card.json")
    cards.require(folder / "card.json", card, kind="weights", made_from__format="safetensors")
    model = Weights.from_card(card, tensors.read(folder / "model.safetensors"))
    wanted, found = model.shapes(), {name: x.shape for name, x in model.arrays.items()}
    differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder}: {len(differing)} arrays do not fit its card; the first is {name},"
            f" {found.get(name, 'missing')} instead of {wanted.get(name, 'none')}"
        )
    return model
