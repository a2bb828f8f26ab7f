# SPDX-License-Identifier: Apache-2.0
"""The ragged store: per-utterance arrays (features, labels) as a few .npy shards on disk.

    FOLDER/shard-00000-of-00008.npy   rows of a contiguous run of utterances: (rows, width), (rows,)
    FOLDER/index.npz                  ids, offsets (row of each utterance's first row, and the end),
                                      shards (position of each shard's first utterance, and the end)
    FOLDER/card.json                  written last: a folder without it is unfinished
    FOLDER/unfinished.json, shard-00000-of-00008.json   until then: the plan, each shard's digest

Shapes: N utterances. A shard is a plain numpy file: `numpy.load` reads it without this package.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from hubert_jax.data import cards, places

PLAN = "unfinished.json"  # what an unfinished folder is being made from

Rows = Iterable[tuple[int, np.ndarray]]  # (position of the utterance, its rows)


class Store:
    """A finished store, read by utterance id or shard by shard through memory maps.

    >>> store = Store("WORK/it1/labels/train")
    >>> store["speaker1/utterance7"]    # (length,) or (length, width)
    """

    def __init__(self, folder: epath.PathLike):
        card = cards.read(epath.Path(folder) / "card.json")
        self._open(epath.Path(folder), card)

    def _open(self, folder: epath.Path, card: cards.Card) -> None:
        self.folder = folder
        self.card = card
        self.width, self.dtype = _form(folder / "card.json", card)
        index = cards.read_arrays(folder / "index.npz", {"ids": "U", "offsets": "i", "shards": "i"})
        self.ids: list[str] = index["ids"].tolist()
        self._offsets: np.ndarray = index["offsets"]
        self._shards: np.ndarray = index["shards"]
        _check_index(folder / "index.npz", len(self.ids), self._offsets, self._shards)
        self._positions = {id_: position for position, id_ in enumerate(self.ids)}
        self._memmaps: dict[int, np.ndarray] = {}
        for shard in range(self.num_shards):
            self.shard(shard)  # every size against the index, now rather than in the middle

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each utterance, int64 N."""
        return np.diff(self._offsets)

    @property
    def num_rows(self) -> int:
        return int(self._offsets[-1])

    @property
    def num_shards(self) -> int:
        return len(self._shards) - 1

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._positions

    def __getitem__(self, id_: str) -> np.ndarray:
        """The rows of one utterance, a view of the file."""
        position = self._positions.get(id_)
        if position is None:
            raise KeyError(f"{self.folder}: no utterance {id_!r} among {len(self)}")
        shard = int(np.searchsorted(self._shards, position, side="right")) - 1
        start = self._offsets[self._shards[shard]]
        return self.shard(shard)[
            self._offsets[position] - start : self._offsets[position + 1] - start
        ]

    def shard(self, shard: int) -> np.ndarray:
        """All rows of one shard, a read-only memory map."""
        if shard not in self._memmaps:
            first, stop = self._shards[shard], self._shards[shard + 1]
            rows = int(self._offsets[stop] - self._offsets[first])
            shape = (rows,) if self.width is None else (rows, self.width)
            path = shard_path(self.folder, shard, self.num_shards)
            self._memmaps[shard] = _read_shard(path, shape, self.dtype)
        return self._memmaps[shard]

    def shard_ids(self, shard: int) -> list[str]:
        """The utterances of one shard, in the order of its rows."""
        return self.ids[self._shards[shard] : self._shards[shard + 1]]

    def check(self) -> None:
        """Reads every shard and compares it with the card. Raises ValueError naming the damaged."""
        names = [shard_path(self.folder, n, self.num_shards).name for n in range(self.num_shards)]
        digests = self.card.get("shards")
        for name in names:
            digest = digests.get(name) if isinstance(digests, dict) else None
            if cards.digest(self.folder / name) != digest:
                raise ValueError(
                    f"{self.folder / name}: is not what its card says: damaged or changed since it"
                    f" was made; remove {self.folder} and run its stage again"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memmaps": {}}  # worker processes map the files themselves


def is_made(folder: epath.PathLike, made_from: cards.Card) -> bool:
    """Whether the store is finished and made from this; as cards.is_made.

    A run that was killed right after the card was written has left what it needed before; it goes.
    """
    folder = epath.Path(folder)
    if not cards.is_made(folder / "card.json", made_from):
        return False
    _clear(folder)
    return True


def write_store(
    folder: epath.PathLike,
    *,
    ids: Sequence[str],
    lengths: np.ndarray,
    width: int | None,
    dtype: np.typing.DTypeLike,
    num_shards: int,
    produce: Callable[[np.ndarray], Rows],
    card: cards.Card,
    results: Callable[[Store], cards.Card] = lambda store: {},
    process: tuple[int, int] = (0, 1),
    barrier: Callable[[], object] = lambda: None,
) -> None:
    """Writes a store, shard by shard; started again after an interruption it skips whole shards.

    `produce(positions)` is called once for every missing shard and gives (position, rows) once for
    each position, in any order, rows of shape (length, width), or (length,) where width is None.
    `results(store)` sees the whole store and returns further fields for the card (scores, counts).
    With several processes (`process` = index, count) each writes its share of the shards, `barrier`
    waits for all of them, and the first writes the card.
    """
    folder, dtype = epath.Path(folder), np.dtype(dtype)
    if len(ids) == 0:
        raise ValueError(f"{folder}: no utterances to store")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{folder}: {len(ids) - len(set(ids))} utterance ids occur twice")
    if len(ids) != len(lengths):
        raise ValueError(f"{folder}: {len(ids)} ids for {len(lengths)} lengths")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    bounds = shard_bounds(offsets, num_shards)
    process_index, num_processes = process

    if process_index == 0:
        _start(folder, card, ids, offsets, bounds, width, dtype)
    barrier()
    for shard in range(process_index, len(bounds) - 1, num_processes):
        path = shard_path(folder, shard, len(bounds) - 1)
        if not path.exists():
            positions = np.arange(bounds[shard], bounds[shard + 1])
            with cards.whole(path) as unfinished:
                with open(unfinished, "wb") as file:
                    _write_shard(file, path, produce(positions), positions, offsets, width, dtype)
                # Taken now: what happens to the shard before the store is finished will show.
                cards.write(path.with_suffix(".json"), {"digest": cards.digest(unfinished)})
    barrier()
    if process_index == 0:
        _finish(folder, card, results, bounds, width, dtype)
    barrier()


def shard_bounds(offsets: np.ndarray, num_shards: int) -> np.ndarray:
    """First utterance of every shard, and the end: contiguous runs of about equally many rows."""
    num_utterances = len(offsets) - 1
    num_shards = max(1, min(num_shards, num_utterances))
    shares = offsets[-1] * np.arange(1, num_shards) / num_shards
    return np.concatenate([[0], np.searchsorted(offsets[1:], shares), [num_utterances]])


def shard_path(folder: epath.Path, shard: int, num_shards: int) -> epath.Path:
    return folder / f"shard-{shard:05d}-of-{num_shards:05d}.npy"


def _start(
    folder: epath.Path,
    card: cards.Card,
    ids: Sequence[str],
    offsets: np.ndarray,
    bounds: np.ndarray,
    width: int | None,
    dtype: np.dtype,
) -> None:
    """Refuses to go on with shards of something else; notes what this folder is made from."""
    layout = hashlib.sha256("\n".join(ids).encode() + offsets.tobytes() + bounds.tobytes())
    plan = {
        **card["made_from"],
        "layout": {"digest": layout.hexdigest(), "width": width, "dtype": dtype.name},
    }
    if not cards.is_made(folder / PLAN, plan):
        cards.write(folder / PLAN, {"made_from": plan})
    with cards.whole(folder / "index.npz") as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, ids=np.array(ids, np.str_), offsets=offsets, shards=bounds)


def _write_shard(
    file: BinaryIO,
    path: epath.Path,
    produced: Rows,
    positions: np.ndarray,
    offsets: np.ndarray,
    width: int | None,
    dtype: np.dtype,
) -> None:
    """One .npy file, every utterance written at its place as it comes: nothing is held back.

    Plain writes and not a memory map, so that a full disk is an error and not a dead process.
    """
    tail = () if width is None else (width,)
    first, stop = offsets[positions[0]] if len(positions) else 0, 0
    if len(positions):
        stop = offsets[positions[-1] + 1]
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (int(stop - first), *tail),
    }
    np.lib.format.write_array_header_1_0(file, header)
    start, row_bytes = file.tell(), dtype.itemsize * (width or 1)
    missing = set(positions.tolist())
    for position, rows in produced:
        want = (int(offsets[position + 1] - offsets[position]), *tail)
        if position not in missing:
            raise ValueError(f"{path}: utterance {position} produced twice, or not asked for")
        if rows.shape != want:
            raise ValueError(f"{path}: utterance {position} gave {rows.shape} rows, planned {want}")
        rows = rows.astype(dtype, casting="same_kind", order="C", copy=False)
        if dtype.kind == "f" and not np.isfinite(rows).all():
            raise ValueError(
                f"{path}: utterance {position} has values that are not finite in {dtype.name}; "
                "if they are too large for it, store float32"
            )
        missing.remove(position)
        file.seek(start + int(offsets[position] - first) * row_bytes)
        file.write(rows.tobytes())
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(positions)} utterances were not produced, "
            f"the first is {min(missing)}"
        )


def _finish(
    folder: epath.Path,
    card: cards.Card,
    results: Callable[[Store], cards.Card],
    bounds: np.ndarray,
    width: int | None,
    dtype: np.dtype,
) -> None:
    paths = [shard_path(folder, i, len(bounds) - 1) for i in range(len(bounds) - 1)]
    card = {**card, "width": width, "dtype": dtype.name}
    store = Store.__new__(Store)
    store._open(folder, card)
    card = {
        **card,
        "num_utterances": len(store),
        "num_rows": store.num_rows,
        "shards": {path.name: _digest(path) for path in paths},
        **results(store),
    }
    cards.write(folder / "card.json", card)
    _clear(folder)


def _digest(path: epath.Path) -> str | None:
    """Of a shard as it was written; of one by a version that kept none, as it is."""
    card = path.with_suffix(".json")
    return cards.read(card).get("digest") if card.exists() else cards.digest(path)


def _clear(folder: epath.Path) -> None:
    """Removes what an unfinished store needs and a finished one does not."""
    for path in folder.glob("shard-*.json"):
        path.unlink(missing_ok=True)  # other processes do the same
    (folder / PLAN).unlink(missing_ok=True)


def _form(path: epath.Path, card: cards.Card) -> tuple[int | None, np.dtype]:
    """(width, dtype) that a card says. Raises ValueError where it is no store's card."""
    width, dtype = card.get("width"), card.get("dtype")
    if dtype not in ("int16", "float16", "float32") or not (width is None or type(width) is int):
        raise ValueError(
            f"{path}: not the card of arrays: width {width!r}, dtype {dtype!r}; remove"
            f" {path.parent} and run its stage again"
        )
    return width, np.dtype(dtype)


def _check_index(path: epath.Path, num: int, offsets: np.ndarray, shards: np.ndarray) -> None:
    for array, first, last in ((offsets, 0, None), (shards, 0, num)):
        ends = len(array) > 0 and array[0] == first and (last is None or array[-1] == last)
        if array.ndim != 1 or not ends or (np.diff(array) < 0).any() or len(offsets) != num + 1:
            raise ValueError(
                f"{path}: broken, its positions do not fit together; remove {path.parent} and run"
                " its stage again"
            )


def _read_shard(path: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        # An empty file cannot be mapped.
        array = np.load(places.local(path), mmap_mode="r" if shape[0] else None)
    except cards.DAMAGED as error:
        raise ValueError(
            f"{path}: missing or broken ({error}); remove {path.parent} and run its stage again"
        ) from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{path}: holds {array.shape} {array.dtype}, the index says {shape} {dtype}; "
            f"remove {path.parent} and run its stage again"
        )
    return np.asarray(array)  # slices of a np.memmap object are slow
