# SPDX-License-Identifier: Apache-2.0
"""The collectives of a compiled program, read from its HLO text: kind, mesh axes, count, bytes.

A collective in the body of a loop counts as often as the loop turns, one in a branch as if the
branch were taken. Bytes are those that a device sends when the collective runs as a ring.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
ITEM_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONSTANT = re.compile(r"^[su]\d+\[\]\S* constant\((\d+)\)")
OPERANDS = re.compile(r"%([\w.\-]+(?:#\d+)?)")
# Of a tuple: an instruction, or, as libtpu 0.0.50 writes it, the end of an operand: %tuple#0.
ELEMENT = re.compile(r" get-tuple-element\(%[\w.\-]+\), index=(\d+)|#(\d+)$")
CHANNEL = re.compile(r"channel_id=(\d+)")
IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
MESH_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+)|=(\d+))?")
LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")


Instructions = dict[str, str]  # name -> what follows the equals sign, the result last


class Collective(NamedTuple):
    kind: str
    axes: tuple[str, ...]  # of the mesh, along which devices exchange
    shapes: tuple[tuple[int, ...], ...]  # of what a device holds afterwards
    result_bytes: int
    group_size: int
    times: int  # in one run of the program

    @property
    def sent_bytes(self) -> float:
        """That a device sends each time."""
        share = (self.group_size - 1) / self.group_size
        return self.result_bytes * {
            "all-reduce": 2 * share,
            "reduce-scatter": self.group_size - 1,
            "collective-permute": 1,
        }.get(self.kind, share)


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of a compiled module's text, on a mesh of these axes and sizes.

    Raises ValueError for replica groups in a form that is not known here.
    """
    bodies, entry = _computations(text)
    found: dict[str, Collective] = {}  # by channel: one that is asynchronous stands in two places
    for name, times in _executions(bodies, entry).items():
        for place, line in bodies[name].items():
            opcode, result = _opcode(line)
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                one = _collective(kind, opcode, result, line, mesh_shape, times)
                if name.startswith("all-reduce-scatter"):  # XLA's name for what TPUs do at once
                    one = one._replace(
                        kind="reduce-scatter", result_bytes=one.result_bytes // one.group_size
                    )
                channel = CHANNEL.search(line)
                found[channel[1] if channel else f"{name} {place}"] = one
    return [one for one in found.values() if one.group_size > 1]


def _computations(text: str) -> tuple[dict[str, Instructions], str]:
    """The instructions of every computation, and the name of the first one to run."""
    bodies: dict[str, Instructions] = {}
    entry, lines = "", None
    for line in text.splitlines():
        header = COMPUTATION.match(line)
        if header:
            lines = bodies.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            instruction = INSTRUCTION.match(line)
            if instruction:
                lines[instruction[1]] = instruction[2]
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY: is it HLO?")
    return bodies, entry


def _executions(bodies: dict[str, Instructions], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in bodies[name].values():
            opcode, _ = _opcode(line)
            if opcode.endswith(("-update", "-done")):  # of what its -start has called
                continue
            turns = _turns(line, bodies) if opcode == "while" else 1
            for callee in _callees(line):
                if callee in bodies:
                    visit(callee, count * turns)

    visit(entry, 1)
    return times


def _turns(line: str, bodies: dict[str, Instructions]) -> int:
    """How often a loop turns: as XLA says, or as its condition and its counter do.

    Raises ValueError where it does not count up to a constant in constant steps.
    """
    said = TRIPS.search(line)
    if said:
        return int(said[1])
    condition, body = (
        bodies[re.search(rf"{part}=%?([\w.\-]+)", line)[1]]  # type: ignore[index]
        for part in ("condition", "body")
    )
    compared = [value for value in condition.values() if _opcode(value)[0] == "compare"]
    operands = [condition.get(name, name) for each in compared for name in _operands(each)]
    element = ELEMENT.search(operands[0]) if len(operands) == 2 else None
    limited = CONSTANT.search(operands[1]) if element else None
    if not element or not limited or "direction=LT" not in compared[0]:
        raise ValueError(f"a loop without a known number of turns: {line[:200]}")
    place = int(element[1] or element[2])
    # XLA unrolls rings of permutes: such a loop counts two at each turn.
    *_, results = (value for value in body.values() if _opcode(value)[0] == "tuple")
    counted = _operands(results)[place]
    added = [body.get(name, name) for name in _operands(body.get(counted, counted))]
    steps = [int(found[1]) for found in map(CONSTANT.search, added) if found]
    if len(steps) != 1:
        raise ValueError(f"a loop whose counter's step is not known: {line[:200]}")
    return -(-int(limited[1]) // steps[0])


def _operands(line: str) -> list[str]:
    """The names in the parentheses after an instruction's opcode."""
    opcode, _ = _opcode(line)
    return OPERANDS.findall(line.partition(f" {opcode}(")[2].partition(")")[0])


def _callees(line: str) -> Iterator[str]:
    for _, names in CALLED.findall(line):
        for name in names.strip("{}").split(","):
            yield name.strip().removeprefix("%")


def _opcode(line: str) -> tuple[str, str]:
    """The opcode of 'TYPE OPCODE(...), ...' and the text of its type."""
    if line.startswith("("):  # a tuple: its type ends with the parenthesis
        depths = itertools.accumulate((c == "(") - (c == ")") for c in line)
        end = next(place for place, depth in enumerate(depths) if depth == 0)
        return line[end + 1 :].lstrip().partition("(")[0], line[: end + 1]
    result, _, rest = line.partition(" ")
    return rest.partition("(")[0], result


def _collective(
    kind: str, opcode: str, result: str, line: str, mesh_shape: Mapping[str, int], times: int
) -> Collective:
    shapes = [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in SHAPE.findall(result)
    ]
    if opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, and scalars that the runtime counts with)
        shapes = [shape for shape in shapes if not (shape[0] == "u32" and not shape[1])]
        shapes = shapes[len(shapes) // 2 :]
    axes, size = _groups(line, mesh_shape)
    return Collective(
        kind,
        axes,
        tuple(sizes for _, sizes in shapes),
        sum(_item_bytes(dtype) * math.prod(sizes) for dtype, sizes in shapes),
        size,
        times,
    )


def _item_bytes(dtype: str) -> int:
    if dtype in ITEM_BYTES:
        return ITEM_BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    assert bits is not None, dtype
    return max(1, int(bits[0]) // 8)


def _groups(line: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes that a collective's groups span, and the size of a group."""
    num_devices = math.prod(mesh_shape.values())
    iota, listed, pairs = IOTA_GROUPS.search(line), LISTED_GROUPS.search(line), PAIRS.search(line)
    named = MESH_GROUPS.search(line)
    if iota:
        groups = _iota(num_devices, iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    elif named:
        groups = _named_groups(num_devices, *named.groups())
    elif listed or pairs:
        text = (listed or pairs)[1]  # type: ignore[index]
        groups = [_numbers(group) for group in text.strip("{}").split("},{")]
    elif "replica_groups={}" in line:
        groups = [list(range(num_devices))]
    else:
        raise ValueError(f"replica groups in a form that is not known: {line[:300]}")
    sizes = tuple(mesh_shape.values())
    varying = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, sizes))
        varying |= (places != places[:, :1]).any(axis=1)
    axes = tuple(axis for axis, varies in zip(mesh_shape, varying, strict=True) if varies)
    return axes, 2 if pairs else len(groups[0])


def _iota(num_devices: int, shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(num_devices).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _named_groups(num_devices: int, mesh: str, shape: str | None, order: str | None, over: str):
    """Of mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}.

    That is over a, and over the part of b that has 2 entries after the first 2.
    """
    axes = {name: int(size) for name, _, _, size in MESH_AXIS.findall(mesh)}
    ids = _iota(num_devices, shape or str(num_devices), order)
    parts: dict[str, tuple[int, int]] = {}
    for name, before, size, _ in MESH_AXIS.findall(over):
        parts[name] = (int(before), int(size)) if size else (1, axes[name])
    dims, grouped = [], []
    for name, size in axes.items():
        before, part = parts.get(name, (1, 1))
        dims += [before, part, size // before // part]
        grouped += [False, name in parts, False]
    ids = ids.reshape(dims)
    kept = [place for place, inside in enumerate(grouped) if not inside]
    inside = [place for place, inside in enumerate(grouped) if inside]
    group_size = math.prod(dims[place] for place in inside)
    return ids.transpose(kept + inside).reshape(-1, group_size).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
