# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that hold a model and no optimiser; test_train.py has those of a run."""

import numpy as np
import pytest
from etils import epath

from hubert_jax import checkpoints, weights
from hubert_jax.data import cards
from hubert_jax.heads import Weights
from tests import tiny


def made(seed: int) -> tuple[Weights, dict]:
    model = Weights(tiny.BASE, None, (), None, {})
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=s).astype(np.float32) for name, s in model.shapes().items()}
    card = cards.new("checkpoint", made_from={"imported": weights.digest(arrays)}, **model.facts())
    return model._replace(arrays=arrays), card


def test_weights_come_back_and_may_be_written_again(tmp_path):
    for _ in range(2):
        checkpoints.write_weights(epath.Path(tmp_path), *made(0))
    found, card = checkpoints.load_weights(tmp_path)
    assert card["step"] == 0 and found.config == tiny.BASE
    for name, array in made(0)[0].arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_another_checkpoint_is_never_taken_for_the_one_written(tmp_path):
    checkpoints.write_weights(epath.Path(tmp_path), *made(0))  # and killed before its folder's card
    with pytest.raises(ValueError, match=r"made_from\.imported is 'sha256:.* remove"):
        checkpoints.write_weights(epath.Path(tmp_path), *made(1))
    (tmp_path / "0").rename(tmp_path / "7")
    with pytest.raises(ValueError, match=r"made_from\.imported is 'sha256:"):
        checkpoints.write_weights(epath.Path(tmp_path), *made(1))
