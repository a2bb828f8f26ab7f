# SPDX-License-Identifier: Apache-2.0
"""What every stage will still write, against what is free."""

from collections.abc import Mapping

from hubert_jax.doctor.findings import Finding, graded
from hubert_jax.ops import frames

FLAC_BYTES_PER_SECOND = 19_100  # what prepare wrote of LibriSpeech, docs/SCALING.md
MARGIN = 1.25


def corpus_bytes(num_samples: int) -> int:
    return int(FLAC_BYTES_PER_SECOND * num_samples / frames.SAMPLE_RATE)


def features_bytes(num_samples: int, *, share: float, rate: int, width: int, dtype: str) -> int:
    num_bytes = 2 if dtype == "float16" else 4
    return int(share * num_samples / frames.SAMPLE_RATE * rate * width * num_bytes)


def labels_bytes(num_samples: int, *, rate: int) -> int:
    return int(2 * num_samples / frames.SAMPLE_RATE * rate)


def checkpoints_bytes(
    num_parameters: int, *, num_steps: int, keep_last: int, keep_every: int
) -> int:
    """Weights and two moments in float32, of all that are kept and the one being written."""
    kept = keep_last + 1 + (num_steps // keep_every if keep_every else 0)
    return 12 * num_parameters * kept


def of_disk(needed: Mapping[str, int], free: int | None, *, is_whole: bool) -> list[Finding]:
    """`needed`: bytes that are still to be written, by stage; their sum is held against `free`.

    `free` is None where it is not known, `is_whole` false where what grows with the audio is not.
    """
    total = sum(needed.values())
    parts = [f"{name} {_size(num)}" for name, num in needed.items() if num]
    if not is_whole:
        parts.append("corpus, features and labels: not known before hubert prepare")
    words = f"{_size(total)} to come ({', '.join(parts) or 'nothing'})"
    is_short = free is not None and MARGIN * total > free
    return [
        graded(
            "disk",
            f"{'' if is_whole else 'at least '}{words}, "
            + ("what is free in a bucket is not known" if free is None else f"{_size(free)} free"),
            "free some, or lower features.sample_share, checkpoints.keep_last or raise"
            " checkpoints.keep_every"
            if is_short
            else "the hours of the audio are not known, see above",
            is_look=is_short or not is_whole,
            is_stop=free is not None and total > free,
        )
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
