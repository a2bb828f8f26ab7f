# SPDX-License-Identifier: Apache-2.0
"""The loop: accumulation, exact resume, signals, metrics a step late."""

import errno
import functools
import os
import signal

import jax
import numpy as np
import pytest

from hubert_jax import checkpoints, optim, pretraining, sharding, stopping, train
from tests import tiny
from tests.test_sharding import OPTIM, batch

LOSS = functools.partial(
    pretraining.loss, config=pretraining.LossConfig(10.0, 1.0, 0.0), num_steps=10
)
KEEP = checkpoints.CheckpointConfig(every=2, keep_last=2, keep_every=0)


@pytest.fixture
def trained():
    """(state at step 0, step function): a tiny model under dropout and layer drop."""
    config = tiny.dataclasses.replace(tiny.BASE, dropout=0.1, layer_drop=0.2)
    optimizer = optim.adamw(OPTIM, num_steps=10)
    step = train.make_step(LOSS, optimizer, accumulate=1)
    return lambda: train.init_state(tiny.model(config), optimizer), step


def batches(first, last):
    rng = np.random.default_rng(7)
    audio = rng.normal(size=(10, 8, 8_000)).astype(np.float32)
    for n in range(first, last):
        yield n, batch() | {"audio": audio[n]}


def fit(state, step, first, num_steps, **changes):
    options = dict(
        key=jax.random.key(3), num_steps=num_steps, report=lambda *args: None, report_every=100,
        validate=lambda state: None, validate_every=100, save=lambda state: None, save_every=100,
    )  # fmt: skip
    return train.fit(state, step, batches(first, num_steps), **(options | changes))


def assert_same(got, want):
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_four_steps_are_two_and_a_restart_and_two(trained, tmp_path):
    make, step = trained
    straight = fit(make(), step, 0, 4)
    saved = checkpoints.Checkpoints(tmp_path / "checkpoints", KEEP)
    saved.save(fit(make(), step, 0, 2), {"kind": "checkpoint"})
    saved.close()

    again = checkpoints.Checkpoints(tmp_path / "checkpoints", KEEP)
    restored = again.restore(make())
    again.close()
    assert int(restored.step) == 2
    assert_same(fit(restored, step, 2, 4), straight)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (make().model, straight.model)),
                                              strict=True))  # fmt: skip


def test_a_checkpoint_restores_onto_another_mesh(trained, tmp_path):
    make, step = trained
    saved = checkpoints.Checkpoints(tmp_path / "checkpoints", KEEP)
    state = fit(make(), step, 0, 1)
    saved.save(state, {"kind": "checkpoint"})
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    model = sharding.make_sharded(lambda key: tiny.model(), jax.random.key(0), mesh)
    target = train.init_state(model, optim.adamw(OPTIM, num_steps=10))
    restored = saved.restore(target)
    saved.close()
    assert_same(restored, state)
    for got, want in zip(*map(jax.tree.leaves, (restored.model, model)), strict=True):
        assert got.sharding == want.sharding


def test_a_checkpoint_of_another_shape_is_refused(trained, tmp_path):
    make, _ = trained
    saved = checkpoints.Checkpoints(tmp_path / "checkpoints", KEEP)
    saved.save(make()._replace(step=jax.numpy.int32(1)), {"kind": "checkpoint"})
    other = train.init_state(tiny.model(num_codes=(13,)), optim.adamw(OPTIM, num_steps=10))
    with pytest.raises(ValueError, match=r"head.codes_CE has shape \(12, 8\), .* wants \(13, 8\)"):
        saved.restore(other)
    saved.close()


@pytest.mark.parametrize(
    "error",
    (
        ValueError("RESOURCE_EXHAUSTED: Error writing ... No space left on device [28]"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),  # of a file that Orbax writes itself
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ),
)
def test_a_full_disk_is_said_in_words(tmp_path, error):
    words = rf"no space left writing a checkpoint to {tmp_path}; .* run the same command"
    with pytest.raises(OSError, match=words), checkpoints.enough_space(tmp_path):
        raise error


@pytest.mark.parametrize("error", (ValueError("another"), PermissionError("another")))
def test_what_is_not_a_full_disk_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error), match="another"), checkpoints.enough_space(tmp_path):
        raise error


def test_old_checkpoints_go_and_milestones_stay(trained, tmp_path):
    make, _ = trained
    config = checkpoints.CheckpointConfig(every=1, keep_last=2, keep_every=3)
    saved = checkpoints.Checkpoints(tmp_path / "checkpoints", config)
    for n in range(1, 7):
        saved.save(make()._replace(step=jax.numpy.int32(n)), {"kind": "checkpoint"})
    saved.close()
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [3, 5, 6]


def test_accumulation_is_the_whole_batch():
    """Masks differ, so the comparison uses a loss without randomness."""

    def loss(model, batch, key, step):
        logits, penalty = model(batch["audio"], np.zeros(batch["labels"].shape[:2], bool))
        frames = batch["labels"][..., 0].size
        return train.Loss(jax.numpy.sum(logits[0] ** 2) + penalty * frames, frames * 1.0, {})

    optimizer = optim.adamw(OPTIM, num_steps=10)
    results = []
    for accumulate in (1, 2, 4):
        state = train.init_state(tiny.model(), optimizer)
        step = train.make_step(loss, optimizer, accumulate=accumulate)
        state, metrics = step(state, batch(), jax.random.key(0))
        results.append((jax.device_get(state.model), float(metrics["gradient_norm"][0])))
    for model, norm in results[1:]:
        assert norm == pytest.approx(results[0][1], rel=1e-5)
        for got, want in zip(*map(jax.tree.leaves, (model, results[0][0])), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_reports_cover_every_step_once_and_one_step_late(trained):
    make, step = trained
    seen = []
    fit(make(), step, 0, 5, report_every=2, report=lambda n, sums, *_: seen.append((n, sums)))
    assert [n for n, _ in seen] == [1, 3, 5]
    assert [sums["gradient_norm"][1] for _, sums in seen] == [1, 2, 2]


class Pending:
    """A number that a device still computes: whoever reads it waits for the device."""

    def __init__(self, step: int, log: list):
        self.step, self.log = step, log

    def __array__(self, *_, **__):
        self.log.append(("read", self.step))
        return np.float32(1)


def test_a_number_is_read_once_and_only_when_the_next_step_is_on_its_way():
    log: list = []

    def step(state, batch, key):
        log.append(("sent", state.step + 1))
        return state._replace(step=state.step + 1), {"loss": (Pending(state.step + 1, log), 1.0)}

    fit(train.State(0, None, None), step, 0, 10, report_every=4)
    sent, read = ([(what, n) for n in range(1, 11)] for what in ("sent", "read"))
    assert log == [*sent[:4], *read[:3], *sent[4:8], *read[3:7], *sent[8:], *read[7:]]


def test_a_signal_saves_and_stops(trained):
    make, step = trained
    saved, seen = [], []
    handler = signal.getsignal(signal.SIGTERM)

    def interrupting(state, batch, key):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch, key)

    with pytest.raises(train.Interrupted, match="SIGTERM after step 3"):
        fit(
            make(), interrupting, 0, 5, save=lambda state: saved.append(int(state.step)),
            report=lambda n, sums, *_: seen.append((n, sums["gradient_norm"][1])), report_every=2,
        )  # fmt: skip
    assert saved == [3]
    assert seen == [(1, 1), (3, 2)]  # no step's metrics are lost
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_in_the_last_validation_interrupts_too(trained):
    make, step = trained
    with pytest.raises(train.Interrupted, match="after step 2; it is saved"):
        fit(make(), step, 0, 2, validate=lambda state: os.kill(os.getpid(), signal.SIGTERM))


def test_a_signal_in_a_validation_finds_the_step_saved_and_it_is_validated_first(trained):
    make, step = trained
    events: list[tuple[str, int]] = []

    def validate(state):
        events.append(("validated", int(state.step)))
        if len(events) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        stopping.heed()

    def save(state):
        events.append(("saved", int(state.step)))

    options = dict(validate=validate, validate_every=2, save=save, save_every=2)
    with pytest.raises(train.Interrupted, match="after step 2; it is saved"):
        fit(make(), step, 0, 4, **options)
    assert events == [("saved", 2), ("validated", 2), ("saved", 2)]
    events.clear()
    state = fit(make(), step, 0, 2)
    fit(state, step, 2, 4, **options, validate_first=True)
    assert events == [("validated", 2), ("saved", 4), ("validated", 4)]


def test_the_unmasked_weight_moves_linearly_and_counts_frames_only_while_it_is_above_zero():
    model = tiny.model()
    losses = {}
    for start, end, at in [(0.0, 0.0, 0), (1.0, 0.0, 0), (1.0, 0.0, 5), (1.0, 0.0, 10)]:
        config = pretraining.LossConfig(10.0, start, end)
        value = pretraining.loss(model, batch(), jax.random.key(0), at, config=config, num_steps=10)
        losses[start, at] = value
    masked = losses[0.0, 0]
    unmasked_sum = float(masked.metrics["unmasked_loss"][0])
    penalty = float(masked.metrics["feature_penalty"][0])
    num_frames = batch()["labels"].size
    assert float(masked.weight) == masked.metrics["masked_loss"][1] < num_frames
    assert float(losses[1.0, 0].weight) == float(losses[1.0, 5].weight) == num_frames
    assert float(losses[1.0, 10].weight) == float(masked.weight)
    for at, weight in ((0, 1.0), (5, 0.5)):
        want = float(masked.metrics["masked_loss"][0]) + weight * unmasked_sum
        want += 10.0 * penalty * num_frames
        assert float(losses[1.0, at].total) == pytest.approx(want, rel=1e-5)


def test_two_label_sets_are_summed_and_divided_by_the_frames_of_one():
    model = tiny.model(num_codes=(12, 7))
    labels = np.concatenate([batch()["labels"], batch()["labels"] % 7], axis=-1)
    value = jax.jit(functools.partial(LOSS, config=pretraining.LossConfig(0.0, 0.0, 0.0)))(
        model, batch() | {"labels": labels}, jax.random.key(0), 0
    )
    parts = [float(value.metrics[name][0]) for name in ("masked_loss", "masked_loss_1")]
    assert float(value.total) == pytest.approx(sum(parts), rel=1e-5) and min(parts) > 0
    assert float(value.weight) == value.metrics["masked_loss_1"][1] < labels[..., 0].size


def test_parts_of_a_batch_train_on_a_mesh_like_on_one_device():
    results = []
    for devices in (1, 4):
        mesh = sharding.make_mesh(data=devices, fsdp=1, tensor=1, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            optimizer = optim.adamw(OPTIM, num_steps=10)
            model = sharding.make_sharded(lambda key: tiny.model(), jax.random.key(0), mesh)
            step = train.make_step(LOSS, optimizer, accumulate=2)
            put = sharding.put_batch(mesh, batch())
            _, metrics = step(train.init_state(model, optimizer), put, jax.random.key(0))
            results.append(jax.device_get(metrics))
    for name in ("loss", "gradient_norm", "masked_loss"):
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5)


def test_the_loss_starts_near_ln_k():
    head = tiny.dataclasses.replace(tiny.HEAD, code_width=256)
    value = pretraining.loss(
        tiny.model(num_codes=(100,), head=head), batch(), jax.random.key(0), 0,
        config=pretraining.LossConfig(0.0, 0.0, 0.0), num_steps=10,
    )  # fmt: skip
    assert float(value.total / value.weight) == pytest.approx(np.log(100), abs=1.0)
