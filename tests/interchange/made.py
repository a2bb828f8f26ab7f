# SPDX-License-Identifier: Apache-2.0
"""Models at rest, tiny and random, for all formats."""

import dataclasses

import numpy as np

from hubert_jax.heads import CtcConfig, Weights
from tests import tiny

LETTERS = ("<s>", "<pad>", "</s>", "<unk>", "|", "E", "T")
CTC = CtcConfig(LETTERS, 0)
UNTIED = dataclasses.replace(tiny.HEAD, untied=True)

# What can sit on an encoder: (head, number of codes, CTC).
OUTPUTS = {
    "bare": (None, (), None),
    "one set": (tiny.HEAD, (12,), None),
    "two sets": (tiny.HEAD, (12, 5), None),
    "two sets, untied": (UNTIED, (12, 5), None),
    "ctc": (None, (), CTC),
    "both": (tiny.HEAD, (12,), CTC),
}


def model(kind: str = "base", outputs: str = "one set", *, seed: int = 0, **changes) -> Weights:
    """Every array drawn, so that no two are equal and no zero or one hides an exchange."""
    config = dataclasses.replace(tiny.KINDS[kind], **changes)
    empty = Weights(config, *OUTPUTS[outputs], {})
    rng = np.random.default_rng(seed)
    arrays = {
        name: (0.3 * rng.normal(size=shape)).astype(np.float32)
        for name, shape in empty.shapes().items()
    }
    for name in arrays:  # positive gains, as a trained model has them
        if name.endswith(("scale", "gain_P")):
            arrays[name] = 1 + np.abs(arrays[name])
    return empty._replace(arrays=arrays)


def assert_same(one: Weights, other: Weights) -> None:
    """Bit by bit, and built in the same way."""
    assert one.facts() == other.facts()
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert other.arrays[name].dtype == array.dtype == np.float32
        np.testing.assert_array_equal(other.arrays[name], array, err_msg=name)
