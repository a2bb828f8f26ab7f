# SPDX-License-Identifier: Apache-2.0
"""A codebook on disk: codebook.npz, its centres, and codebook.json, the card that says of what.

While it is fitted there is codebook.unfinished.npz instead: where the fit stands, and of what.

C codes, D width
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from hubert_jax.data import cards, places

UNFINISHED = "codebook.unfinished.npz"
MAX_CODES = np.iinfo(np.int16).max + 1  # labels are stored as int16


def write(
    path: epath.Path,
    centers_CD: np.ndarray,
    *,
    made_from: cards.Card,
    source: Mapping[str, Any],
    rate: int,
    arrays: Mapping[str, np.ndarray],
    **results: Any,
) -> None:
    """The codebook, with `arrays` beside its centres, then its card.

    `source` are the facts of the features, `rate` their frames per second.
    """
    with cards.whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, centers_CD=centers_CD, **arrays)  # type: ignore[arg-type]
    card = cards.new(
        "codebook",
        made_from=made_from,
        source=source,
        rate=rate,
        num_codes=len(centers_CD),
        width=centers_CD.shape[1],
        digest=cards.digest(path),
        **results,
    )
    cards.write(path.with_suffix(".json"), card)


def keep_unfinished(
    folder: epath.Path, arrays: Mapping[str, np.ndarray], *, made_from: cards.Card
) -> None:
    """Where a fit stands, for `read_unfinished`."""
    made = np.array(json.dumps(_made(made_from), sort_keys=True))
    with cards.whole(folder / UNFINISHED) as unfinished, unfinished.open("wb") as file:
        np.savez(file, made_from=made, **arrays)  # type: ignore[arg-type]


def read_unfinished(
    folder: epath.Path, kinds: Mapping[str, str], *, may_lack: Sequence[str], made_from: cards.Card
) -> dict[str, np.ndarray] | None:
    """Where a fit stands, as cards.read_arrays; None where none is under way.

    Raises ValueError where it is damaged or of something else.
    """
    path = folder / UNFINISHED
    if not path.exists():
        return None
    try:
        arrays = cards.read_arrays(path, {**kinds, "made_from": "U"}, may_lack=may_lack)
        made = json.loads(str(arrays.pop("made_from")))
    except ValueError as error:
        raise ValueError("damaged") from error
    difference = cards.first_difference(made, _made(made_from))
    if difference is not None:
        field, found, expected = difference
        raise ValueError(f"{field} was {found!r}, this run has {expected!r}")
    return arrays


def _made(made_from: cards.Card) -> cards.Card:
    """With the versions: another one's fit may go on otherwise."""
    return cards.normal({**made_from, "versions": cards.versions(), "format": cards.FORMAT})


def forget_unfinished(folder: epath.Path) -> None:
    (folder / UNFINISHED).unlink(missing_ok=True)
    cards.forget_unfinished(folder / UNFINISHED)


def read_card(path: epath.PathLike) -> cards.Card:
    """The card of a codebook.npz.

    Raises FileNotFoundError where there is none, ValueError where the file is not what it was when
    the card was written.
    """
    path = epath.Path(path)
    card_path = path.with_suffix(".json")
    if not path.exists() or not card_path.exists():
        raise FileNotFoundError(
            f"{path}: no codebook with its card; WORK/<iteration>/codebook.npz is one: run hubert"
            " cluster first, or hubert import codebook"
        )
    card = cards.read(card_path)
    cards.require(card_path, card, kind="codebook")
    if cards.digest(path) != card.get("digest"):
        raise ValueError(
            f"{path}: is not the codebook of {card_path.name}: one of the two was damaged, edited"
            " or copied alone; remove both and run hubert cluster (or import codebook) again"
        )
    made_from = card.get("made_from", {})
    source = made_from.get("features", made_from).get("source")  # the former by hubert cluster
    if source is not None:
        cards.require(card_path, card, source=source)
    return card


def read_centers(path: epath.PathLike) -> np.ndarray:
    """float32 (C, D) of a codebook.npz."""
    with np.load(places.local(path)) as codebook:
        return codebook["centers_CD"].astype(np.float32)


def read_matching(
    path: epath.Path, *, source: Mapping[str, Any], width: int, num_codes: int
) -> np.ndarray:
    """The centres of a codebook of the features that `source` says. Raises ValueError."""
    cards.require(path.with_suffix(".json"), read_card(path), source=source, num_codes=num_codes)
    centers_CD = read_centers(path)
    if centers_CD.shape != (num_codes, width):
        raise ValueError(
            f"{path}: centres of shape {centers_CD.shape}, expected {(num_codes, width)}; remove it"
            " and run hubert cluster again"
        )
    check_num_codes(num_codes)
    return centers_CD


def check_num_codes(num_codes: int) -> None:
    if num_codes > MAX_CODES:
        raise ValueError(f"kmeans.num_codes is {num_codes}; labels can have at most {MAX_CODES}")
