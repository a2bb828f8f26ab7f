# SPDX-License-Identifier: Apache-2.0
"""A finding: ok, look or stop, with the reason and, where it is not ok, the remedy."""

from collections.abc import Sequence
from typing import NamedTuple

LEVELS = ("ok", "look", "stop")


class Finding(NamedTuple):
    level: str  # of LEVELS
    what: str  # what was looked at: "audio train: duplicates"
    reason: str
    remedy: str = ""


def ok(what: str, reason: str) -> Finding:
    return Finding("ok", what, reason)


def look(what: str, reason: str, remedy: str) -> Finding:
    return Finding("look", what, reason, remedy)


def stop(what: str, reason: str, remedy: str) -> Finding:
    return Finding("stop", what, reason, remedy)


def graded(
    what: str, reason: str, remedy: str, *, is_look: bool = False, is_stop: bool = False
) -> Finding:
    """The worst level whose condition holds."""
    level = "stop" if is_stop else "look" if is_look else "ok"
    return Finding(level, what, reason, remedy if level != "ok" else "")


def worst(found: Sequence[Finding]) -> str:
    return max((finding.level for finding in found), key=LEVELS.index, default="ok")


def as_text(found: Sequence[Finding]) -> str:
    """A line for each, a second one with the remedy."""
    width = max((len(finding.what) for finding in found), default=0)
    lines = []
    for level, what, reason, remedy in found:
        lines.append(f"{level:<4}  {what:<{width}}  {reason}")
        if remedy:
            lines.append(f"{'':<4}  {'':<{width}}  -> {remedy}")
    return "\n".join(lines)
