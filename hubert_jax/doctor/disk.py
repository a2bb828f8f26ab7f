# SPDX-License-Identifier: Apache-2.0
"""What every stage will still write, against what is free."""

from collections.abc import Mapping

from hubert_jax.doctor.findings import Finding, graded
from hubert_jax.ops import frames

FLAC_SHARE = 0.6  # of 16-bit samples; speech takes 0.4 to 0.6
MARGIN = 1.25


def corpus_bytes(num_samples: int) -> int:
    return int(2 * FLAC_SHARE * num_samples)


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


def of_disk(needed: Mapping[str, int], free: int) -> list[Finding]:
    """`needed`: bytes that are still to be written, by stage; the last line is their sum."""
    total = sum(needed.values())
    listed = ", ".join(f"{name} {num / 1e9:.2f}" for name, num in needed.items() if num)
    return [
        graded(
            "disk",
            f"{total / 1e9:.2f} GB to come ({listed or 'nothing'}), {free / 1e9:.2f} GB free",
            "free some, or lower features.sample_share, checkpoints.keep_last or raise"
            " checkpoints.keep_every",
            is_look=MARGIN * total > free,
            is_stop=total > free,
        )
    ]
