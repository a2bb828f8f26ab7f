# SPDX-License-Identifier: Apache-2.0
"""The rows of the bench's table, and how they are printed and kept."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from hubert_jax import logs
from hubert_jax.bench import machine, ours
from hubert_jax.bench.timing import Timing
from hubert_jax.data import cards

HEADER = ("work", "who", "seconds", "first call", "rate", "ratio", "MFU", "memory", "note")


class Row(NamedTuple):
    work: str
    who: str
    seconds: float
    first: float | None = None  # seconds of the first call: compilation and warming up
    rate: str = ""
    ratio: float | None = None  # to ours
    mfu: float | None = None
    memory: int | None = None  # bytes at most, of a process that does nothing else
    note: str = ""


def rows(
    work: str,
    timings: Sequence[Timing],
    rate: Callable[[float], str] = lambda seconds: "",
    *,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """A row for each contender; `rate` says what so many seconds amount to.

    `notes` go before what a contender says of itself.
    """
    own = [timing.median for timing in timings if timing.name == ours.NAME]
    return [
        Row(
            work, t.name, t.median, t.first, rate(t.median),
            ratio=t.median / own[0] if own and len(timings) > 1 else None,
            note="; ".join(filter(None, ((notes or {}).get(t.name), t.note))),
        )
        for t in timings
    ]  # fmt: skip


def printed(found: Sequence[Row]) -> str:
    """The table in Markdown, without columns that are empty."""
    lines = [HEADER, *map(_cells, found)]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return logs.table(list(zip(*columns, strict=True)))


def _cells(row: Row) -> tuple[str, ...]:
    first = "" if row.first is None else f"{row.first:.3g}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    mfu = "" if row.mfu is None else f"{100 * row.mfu:.0f} %"
    memory = "" if row.memory is None else f"{row.memory / 2**30:.2f} GiB"
    return (row.work, row.who, f"{row.seconds:.4g}", first, row.rate, ratio, mfu, memory, row.note)


def write(
    path: epath.Path,
    found: Sequence[Row],
    arguments: dict[str, Any],
    *,
    matmul_peaks: dict[str, float],
) -> None:
    """`matmul_peaks`: FLOP/s of a device in each precision, which MFU rests on."""
    contents = {
        "rows": [row._asdict() for row in found],
        **machine.described(),
        "matmul_peaks": matmul_peaks,
        "arguments": {name: str(value) for name, value in arguments.items()},
    }
    with cards.whole(path) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2))


def read(path: epath.Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]
