# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that hold a model alone, and what is left of killed runs; test_train.py has more."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.experimental import multihost_utils

from hubert_jax import checkpoints, optim, train, weights
from hubert_jax.data import cards
from hubert_jax.heads import Weights
from tests import tiny
from tests.test_sharding import OPTIM


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


def saved(folder, *, steps: tuple[int, ...], keep_last: int, keep_every: int = 0) -> None:
    """Checkpoints as a run leaves them that ends at the last of `steps`."""
    config = checkpoints.CheckpointConfig(every=1, keep_last=keep_last, keep_every=keep_every)
    made = checkpoints.Checkpoints(folder, config)
    for step in steps:
        state = train.State(jax.numpy.int32(step), tiny.model(), (jax.numpy.zeros(1),))
        made.save(state, {"kind": "checkpoint"})
    made.close()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_killed_run_was_writing_is_removed_by_the_next_one(tmp_path):
    saved(tmp_path, steps=(1,), keep_last=1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    saved(tmp_path, steps=(), keep_last=1)
    assert names(tmp_path) == {"1"}


def test_what_a_killed_run_was_removing_is_removed_by_its_own_rule(tmp_path):
    for keep_last, keep_every, want in ((1, 0, {"4"}), (2, 0, {"3", "4"}), (1, 2, {"2", "4"})):
        folder = tmp_path / f"{keep_last}-{keep_every}"
        saved(folder, steps=(1, 2, 3, 4), keep_last=keep_last, keep_every=keep_every)
        assert names(folder) == want
        for step in "123":
            shutil.copytree(folder / "4", folder / step, dirs_exist_ok=True)
        shutil.rmtree(folder / "1" / "params")  # it was at this one
        other = checkpoints.CheckpointConfig(every=1, keep_last=3, keep_every=0)  # asked for now
        again = checkpoints.Checkpoints(folder, other)
        again.finish()
        again.close()
        assert names(folder) == want


@pytest.mark.parametrize(
    ("field", "value"), [("every", 0), ("keep_last", 0), ("keep_every", -1), ("keep_last", True)]
)
def test_a_rule_that_keeps_nothing_is_refused_where_it_is_configured(field, value):
    rule = {"every": 10, "keep_last": 1, "keep_every": 0} | {field: value}
    with pytest.raises(ValueError, match=rf"checkpoints\.{field} is {value}: an integer from"):
        checkpoints.CheckpointConfig(**rule)


@pytest.mark.parametrize("field", ["every", "keep_last", "kept"])
def test_a_rule_that_was_edited_in_a_card_removes_no_checkpoint(tmp_path, field):
    saved(tmp_path, steps=(1, 2), keep_last=2)
    path = tmp_path / "2" / "card" / "metadata"
    card = json.loads(path.read_text())
    edits = {
        "every": {"evary" if name == "every" else name: x for name, x in card["kept"].items()},
        "keep_last": card["kept"] | {"keep_last": 0},
        "kept": "2",
    }
    path.write_text(json.dumps(card | {"kept": edits[field]}))
    again = checkpoints.Checkpoints(tmp_path, checkpoints.CheckpointConfig(1, 1, 0))
    with pytest.raises(ValueError, match=r"/2/card: kept is .* the checkpoint itself is whole"):
        again.finish()
    again.close()
    assert names(tmp_path) == {"1", "2"}


def test_a_card_that_is_not_of_the_training_is_refused_by_field(tmp_path):
    model, card = made(0)
    facts = {"model": card["model"], "head": card["head"]}
    checkpoints.write_weights(epath.Path(tmp_path), model, card | {"made_from": facts})
    path = tmp_path / "0" / "card" / "metadata"
    written = json.loads(path.read_text())
    checkpoints.load_weights(tmp_path)
    path.write_text(json.dumps(written | {"model": written["model"] | {"num_heads": 2}}))
    with pytest.raises(ValueError, match=r"model\.num_heads is 2, it was trained with 4"):
        checkpoints.load_weights(tmp_path)
    path.write_text(json.dumps(written | {"format": 2}))
    with pytest.raises(ValueError, match="format is 2"):
        checkpoints.load_weights(tmp_path)


def test_a_save_does_not_count_as_a_question_whether_to_stop(tmp_path, monkeypatch):
    """jax counts these calls: several processes stop at the same one, and it is stopping.heed's."""

    def asked(step):
        raise AssertionError(f"asked at step {step}")

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked)
    saved = checkpoints.Checkpoints(tmp_path, checkpoints.CheckpointConfig(1, 2, 0))
    with pytest.raises(AssertionError, match="at step 7"):
        ocp.utils.reached_preemption(7)  # what Orbax would ask
    optimizer = optim.adamw(OPTIM, num_steps=10)
    state = train.init_state(tiny.model(), optimizer)
    for step in (100_000, 100_001):
        saved.save(state._replace(step=np.int32(step)), {"kind": "checkpoint"})
    saved.close()
    assert checkpoints.resolve(tmp_path).name == "100001"
