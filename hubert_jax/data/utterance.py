# SPDX-License-Identifier: Apache-2.0
"""What one utterance is: its audio and, where they are known, its phones and words in time.

Dimensions: S samples (16 kHz), N intervals of one utterance.
"""

import pathlib
import posixpath
import re
from typing import NamedTuple

import numpy as np


class Intervals(NamedTuple):
    """Named stretches of one utterance in samples: interval n is [starts[n], stops[n])."""

    starts: np.ndarray  # N int64
    stops: np.ndarray  # N int64
    names: tuple[str, ...]


class Utterance(NamedTuple):
    """One recording, mono at 16 kHz; `phones` and `words` are None where no alignment exists."""

    id: str
    audio_S: np.ndarray  # float32 in [-1, 1]
    speaker: str
    text: str
    phones: Intervals | None
    words: Intervals | None


def id_of(path: str) -> str:
    """The id of the utterance in an audio file: its path below the root, without extension."""
    return posixpath.splitext(pathlib.PurePath(path).as_posix())[0]


def piece_id(id_: str, number: int) -> str:
    """The id of a piece of a recording that was cut because it is long."""
    return f"{id_}--{number:04d}"


def cut_from(id_: str) -> str | None:
    """The id of the recording of which `id_` is a piece, if its name says so."""
    match = re.fullmatch(r"(.+)--\d{4,}", id_)
    return match[1] if match else None
