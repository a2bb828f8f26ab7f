# SPDX-License-Identifier: Apache-2.0
"""What one utterance is: its audio and, where they are known, its phones and words in time.

Dimensions: S samples (16 kHz), N intervals of one utterance.
"""

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
