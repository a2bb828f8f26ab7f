# SPDX-License-Identifier: Apache-2.0
"""Named tensors on disk: safetensors, whole or in shards, and torch's .pt, read without running it.

A .pt file is a pickle, that is, a program. torch's weights-only loader executes none of it, and the
classes that fairseq leaves in its files become `StandIn`s here, which hold what was stored and do
nothing. torch is needed for .pt alone.
"""

import errno
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from hubert_jax.data import cards

SAFETENSORS = ".safetensors"
TORCH = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of a file, or of all files that an index (.index.json) names; floats as float32.

    Raises ValueError for another kind of file, FileNotFoundError.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == SAFETENSORS:
        try:
            state = safetensors.numpy.load_file(os.fspath(path))
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a safetensors file that is whole ({error})") from error
        return {name: _float32(tensor) for name, tensor in state.items()}
    if path.suffix in TORCH:
        return state_dict(load_pt(path), origin=os.fspath(path))
    raise ValueError(f"{path}: weights come as {SAFETENSORS} or {', '.join(TORCH)}")


def write(path: epath.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """A .safetensors file as torch would have written it, or a .pt file; whole or not at all."""
    path = epath.Path(path)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}
    if path.suffix == SAFETENSORS:
        with cards.whole(path) as unfinished:  # transformers wants to know who wrote it
            try:
                safetensors.numpy.save_file(contiguous, unfinished, metadata={"format": "pt"})
            except safetensors.SafetensorError as error:  # whatever happened on the disk
                full = "No space left" in str(error)
                code = errno.ENOSPC if full else errno.EIO
                raise OSError(code, f"writing {path}: {error}") from error
            os.chmod(unfinished, 0o644)  # safetensors makes files that only their owner may read
    else:
        save_pt(path, to_torch(contiguous, path))


def _read_shards(index: epath.Path) -> dict[str, np.ndarray]:
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of shards: {error!r}") from error
    for name in files:
        if not isinstance(name, str) or name != pathlib.PurePosixPath(name).name:
            raise ValueError(f"{index}: shard {name!r} is not a file beside it")
        if name.endswith(INDEX):
            raise ValueError(f"{index}: shard {name!r} is an index, not a file of tensors")
    state: dict[str, np.ndarray] = {}
    for name in files:
        state |= read(index.parent / name)
    return state


def _float32(tensor: np.ndarray) -> np.ndarray:
    """Half precisions widened, which is exact; bfloat16 is no float of numpy's own (kind V)."""
    return tensor.astype(np.float32) if tensor.dtype.kind in "fV" else tensor


# torch's own files.


class StandIn:
    """An object of a class that is not to be imported: what it holds, no behaviour."""

    arguments: tuple[Any, ...] = ()  # pickle may make an object without a call

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def load_pt(path: epath.PathLike) -> Any:
    """The contents of a .pt file, classes of others as `StandIn`s.

    Raises ImportError without torch, ValueError for what cannot be read in this way.
    """
    torch, path = _torch(path), epath.Path(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: not a .pt file, or one from before torch 1.6; load it with torch and save it"
            " again: torch.save(torch.load(path, weights_only=True), path)"
        )
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path))
        classes = [(type(name.rpartition(".")[2], (StandIn,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(classes):
            return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file provokes
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"{path}: not read: {reason}") from error


def save_pt(path: epath.PathLike, contents: Any) -> None:
    """Writes nested dicts and lists of plain values and torch tensors, whole or not at all."""
    torch = _torch(path)
    with cards.whole(path) as unfinished:
        try:
            torch.save(contents, os.fspath(unfinished))
        except RuntimeError as error:  # of the disk; torch does not say which
            reason = f"writing {path}: {str(error).splitlines()[0]}; is the disk full?"
            raise OSError(errno.EIO, reason) from error


def to_torch(state: Mapping[str, np.ndarray], path: epath.PathLike) -> dict[str, Any]:
    torch = _torch(path)
    writable = {name: np.require(x, requirements=["C", "W"]) for name, x in state.items()}
    return {name: torch.from_numpy(x) for name, x in writable.items()}  # jax's are read-only


def state_dict(contents: Any, *, origin: str) -> dict[str, np.ndarray]:
    """numpy arrays of a dictionary of torch tensors. Raises ValueError for anything else."""
    is_tensor = [hasattr(value, "detach") for value in _values(contents)]
    if not is_tensor or not all(is_tensor):
        raise ValueError(f"{origin}: not a state dict: a dictionary of names and tensors is wanted")
    return {
        name: tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in contents.items()
    }


def _values(contents: Any) -> list[Any]:
    return list(contents.values()) if isinstance(contents, Mapping) else []


def plain(value: Any) -> Any:
    """Dicts, lists and values of what stand-ins hold: namespaces, omegaconf's containers, enums."""
    if isinstance(value, StandIn):
        held = {name: x for name, x in vars(value).items() if name != "arguments"}
        for wrapped in ("_content", "_val"):  # omegaconf
            if wrapped in held:
                return plain(held[wrapped])
        if held or len(value.arguments) != 1:
            return plain(held or list(value.arguments))
        return plain(value.arguments[0])  # an enum is a call with its value
    if isinstance(value, Mapping):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return value


def _torch(path: epath.PathLike) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: .pt files are read and written with torch, which is not installed: pip"
            " install torch (its CPU build is enough), or use safetensors"
        ) from error
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise ImportError(
            f"{path}: .pt files are read and written with torch 2.6 or newer, {torch.__version__}"
            " is installed: pip install --upgrade torch, or use safetensors"
        )
    return torch
