# SPDX-License-Identifier: Apache-2.0
"""Cards: the JSON file beside every artefact that says what made it, and whole-or-nothing writing.

    {"kind": "features" | "codebook" | "labels" | "corpus" | "checkpoint",
     "made_from": everything that determines the content: config sections, digests of the inputs,
     "versions": of hubert_jax, jax and numpy,
     "format": FORMAT,
     ... results: counts, scores}

A stage reads the cards of its inputs and refuses what does not fit; it reads the card of its own
output to know whether the work is done.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from hubert_jax.data import leftovers, places

Card = dict[str, Any]

MAX_NAME = 255  # bytes of a file's name, on about every disk
FORMAT = 1  # of cards and of what they describe; raised where an older version would misread it

# What numpy, zipfile and zlib raise for a damaged .npz, among them MemoryError for a shape that no
# machine could hold.
DAMAGED = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError,
    MemoryError, OverflowError, NotImplementedError, RuntimeError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def new(kind: str, *, made_from: Card, **results: Any) -> Card:
    """A card of `kind`; `made_from` decides whether a later run may reuse the artefact."""
    return {
        "kind": kind,
        "made_from": made_from,
        "versions": versions(),
        "format": FORMAT,
        **results,
    }


def write(path: epath.PathLike, card: Card) -> None:
    """Writes the card, keys sorted, whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(_as_json(card))


def read(path: epath.PathLike) -> Card:
    path = epath.Path(path)
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no card; the stage that makes {path.parent} has not run, or did not finish"
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not a card ({error}); remove {path.parent}") from error
    check(path, card)
    return card


def check(path: epath.Path, card: Any) -> None:
    """Raises ValueError where it is no card, or of a format that is not known here."""
    if not isinstance(card, dict) or not isinstance(card.get("made_from", {}), dict):
        raise ValueError(f"{path}: not a card, it holds {str(card)[:40]!r}; remove {path.parent}")
    found = card.get("format", FORMAT)  # absent in those of 0.2.0
    if found != FORMAT:
        wrote = card.get("versions")
        version = wrote.get("hubert_jax") if isinstance(wrote, dict) else None
        raise ValueError(
            f"{path}: format is {found!r}, written by hubert_jax {version}; this is"
            f" {versions()['hubert_jax']}, which knows format {FORMAT}: use that version"
        )


def read_text(path: epath.PathLike) -> str:
    """A UTF-8 file. Raises ValueError naming it where it is not one."""
    try:
        return epath.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_arrays(
    path: epath.PathLike, kinds: Mapping[str, str], *, may_lack: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of an .npz that we wrote; `kinds` are the letters of their dtypes, by name.

    Raises ValueError where the file is damaged (.npz has checksums of its own) or lacks one, but
    for those named in `may_lack`.
    """
    path = epath.Path(path)
    try:
        with np.load(places.local(path), allow_pickle=False) as found:
            arrays = {n: found[n] for n in kinds if n in found.files or n not in may_lack}
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise ValueError(
            f"{path}: damaged ({type(error).__name__}: {str(error)[:200]}); remove {path.parent}"
            " and run its stage again"
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in kinds[name]:
            raise ValueError(
                f"{path}: {name} is {array.dtype}; remove {path.parent} and run its stage again"
            )
    return arrays


def is_made(path: epath.PathLike, wanted: Card, *, option: str = "--workdir") -> bool:
    """Whether the artefact of the card at `path` exists and was made from `wanted`.

    No card: False, the work is to be done. A card made from something else: ValueError naming the
    first field that differs, because overwriting would lose what somebody made. `option` is the
    one that says where the artefact goes.
    """
    path = epath.Path(path)
    if not path.exists():
        return False
    difference = first_difference(read(path).get("made_from", {}), normal(wanted))
    if difference is None:
        return True
    field, found, expected = difference
    raise ValueError(
        f"{path}: made_from.{field} is {found!r}, this run has {expected!r}; "
        f"remove {_artefact(path)} or choose another {option}"
    )


def is_imported(path: epath.PathLike) -> bool:
    """Whether the artefact of the card at `path` is there, brought by `hubert import`."""
    return epath.Path(path).exists() and "imported" in read(path).get("made_from", {})


def require(
    path: epath.PathLike, card: Card, *, option: str = "--workdir", **expected: Any
) -> None:
    """Refuses an input whose card does not say what this stage expects.

    Fields are keywords; one inside another is written with two underscores: `made_from__rate=50`.
    """
    for name, want in expected.items():
        field = name.replace("__", ".")
        found: Any = card
        for part in field.split("."):
            found = found.get(part, _ABSENT) if isinstance(found, dict) else _ABSENT
        difference = first_difference(normal(found), normal(want))
        if difference is None:
            continue
        inner, found, want = difference
        field = f"{field}.{inner}" if inner else field
        raise ValueError(
            f"{path}: {field} is {found!r}, expected {want!r}; remove {_artefact(path)} "
            f"and run its stage again, or choose another {option}"
        )


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a temporary sibling to write (a file or a folder), renamed to `path` at the end.

    On any error the sibling is removed and `path` is as it was: a reader never sees half a file.
    Of a path in a bucket the sibling is a local one, and is uploaded: files appear there whole.
    """
    path = epath.Path(path)
    is_local = places.is_local(path)
    unfinished = _beside(path) if is_local else _elsewhere(path)
    leftover = unfinished if is_local else unfinished.parent
    try:
        with enough_space(path):
            yield unfinished
            if is_local:
                unfinished.replace(path)
            else:
                places.upload(unfinished, path)
                _remove(leftover)
    except BaseException:
        _remove(leftover)
        raise


@contextlib.contextmanager
def enough_space(path: epath.PathLike) -> Iterator[None]:
    """Names the file where the disk is full, or a quota: the system's own error does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left writing {path}; free some and run the same command again: "
            "everything finished so far is kept",
        ) from error


def forget_unfinished(path: epath.Path) -> None:
    """Removes what a run that was killed in `whole` has left beside a local path."""
    if places.is_local(path):
        _beside(path)


def _beside(path: epath.Path) -> epath.Path:
    name = f".unfinished-{path.name}"
    if len(os.fsencode(name)) > MAX_NAME:
        name = f".unfinished-{hashlib.sha256(os.fsencode(path.name)).hexdigest()}"
    unfinished = path.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(unfinished)  # left by a killed run
    return unfinished


def _elsewhere(path: epath.Path) -> epath.Path:
    return epath.Path(leftovers.folder()) / path.name


def digest(path: epath.PathLike) -> str:
    """SHA-256 of a file's bytes, as "sha256:..."."""
    with epath.Path(path).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def versions() -> dict[str, str]:
    found = {}
    for package in ("hubert_jax", "jax", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "not installed"
    return found


def normal(value: Any) -> Any:
    """The value as it comes back from a JSON file: tuples as lists, numpy scalars as numbers."""
    return json.loads(_as_json(value))


_ABSENT = "(absent)"


def first_difference(found: Any, want: Any) -> tuple[str, Any, Any] | None:
    """(dotted field, found, wanted) of the first difference, "" where the values themselves."""
    if isinstance(found, dict) and isinstance(want, dict):
        for key in sorted(found.keys() | want.keys()):
            inner = first_difference(found.get(key, _ABSENT), want.get(key, _ABSENT))
            if inner is not None:
                name = f"{key}.{inner[0]}" if inner[0] else key
                return name, inner[1], inner[2]
        return None
    return None if found == want else ("", found, want)


def _artefact(path: epath.PathLike) -> epath.Path:
    """What a card describes: its folder for card.json, the files of its name for NAME.json."""
    path = epath.Path(path)
    return path.parent if path.name == "card.json" else path.with_suffix(".*")


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a card cannot hold {type(value).__name__}: {value!r}")


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)
