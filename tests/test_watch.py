# SPDX-License-Identifier: Apache-2.0
"""Numbers that go wrong: a step that is not finite touches nothing, and what is said about it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hubert_jax import optim, pretraining, train, watch
from tests import tiny
from tests.test_sharding import OPTIM, batch
from tests.test_train import LOSS, assert_same, fit

STEP = train.make_step(LOSS, optim.adamw(OPTIM, num_steps=10), accumulate=1)


def start() -> train.State:
    return train.init_state(tiny.model(), optim.adamw(OPTIM, num_steps=10))


def broken(kind: str) -> dict:
    """A batch that gives no finite update: a NaN in one sample, infinity, or no frame."""
    bad = batch()
    if kind == "no frames":
        return bad | {"weights": np.zeros_like(bad["weights"])}
    bad["audio"][3, 1000] = np.nan if kind == "nan" else np.inf
    return bad


@pytest.mark.parametrize("kind", ["nan", "infinity", "no frames"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_touches_neither_weights_nor_moments(kind, accumulate):
    step = STEP
    if accumulate > 1:
        step = train.make_step(LOSS, optim.adamw(OPTIM, num_steps=10), accumulate=accumulate)
    key = jax.random.key(0)
    state, _ = step(start(), batch(), key)
    before = jax.device_get(state)
    after, metrics = step(state, broken(kind), key)
    assert int(after.step) == 2
    assert_same((after.model, after.opt_state), (before.model, before.opt_state))
    assert float(metrics["skipped"][0]) == 1.0
    assert all(np.isfinite(part) for pair in metrics.values() for part in pair)
    again, metrics = step(after, batch(), key)
    assert float(metrics["skipped"][0]) == 0.0 and float(metrics["loss"][0]) > 0
    changed = [
        np.any(np.asarray(a) != b)
        for a, b in zip(*map(jax.tree.leaves, (again.model, before.model)), strict=True)
    ]
    assert any(changed)


def test_a_gradient_that_is_not_finite_is_enough_where_the_loss_is():
    def steep(model, batch, key, step):
        value, bias = LOSS(model, batch, key, step), model.head.bias[...].sum()
        zero = jnp.sqrt(jnp.where(step == 1, bias - jax.lax.stop_gradient(bias), 1.0))
        return value._replace(total=value.total + jnp.where(step == 1, zero, 0.0))

    step = train.make_step(steep, optim.adamw(OPTIM, num_steps=10), accumulate=1)
    key = jax.random.key(0)
    state, metrics = step(start(), batch(), key)
    assert float(metrics["skipped"][0]) == 0.0
    before = jax.device_get(state)
    value = steep(state.model, batch(), jax.random.fold_in(key, 1), state.step)
    assert np.isfinite(float(value.total))
    after, metrics = step(state, batch(), key)
    assert float(metrics["skipped"][0]) == 1.0
    assert_same((after.model, after.opt_state), (before.model, before.opt_state))


def test_a_finite_step_is_the_plain_update_to_the_last_bit():
    optimizer = optim.adamw(OPTIM, num_steps=10)

    def total(model, batch, key, step):
        value = LOSS(model, batch, key, step)
        return value.total, value

    @functools.partial(jax.jit, donate_argnums=0)
    def plain(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        grads, value = jax.grad(total, has_aux=True)(state.model, batch, key, state.step)
        grads = jax.tree.map(lambda g: g / value.weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        metrics = {"loss": value.total, "norm": optax.tree.norm(grads)}
        return train.State(state.step + 1, model, opt_state), metrics

    ours, theirs, key = start(), start(), jax.random.key(1)
    for _ in range(3):
        ours, metrics = STEP(ours, batch(), key)
        theirs, want = plain(theirs, batch(), key)
        assert float(metrics["loss"][0]) == float(want["loss"])
    assert_same(ours, theirs)


def test_every_step_is_watched_once_in_order_before_it_is_reported():
    seen = []
    fit(
        start(), STEP, 0, 5, report_every=2, report=lambda n, *_: seen.append(("report", n)),
        watch=lambda n, sums: seen.append((n, float(sums["skipped"][0]))),
    )  # fmt: skip
    assert seen == [
        (1, 0.0), ("report", 1), (2, 0.0), (3, 0.0), ("report", 3), (4, 0.0), (5, 0.0),
        ("report", 5),
    ]  # fmt: skip


def watched():
    said: list[str] = []
    looking = watch.Watch(
        "pretrain it1", utterances=lambda step: [f"ann/{step}", f"bob/{step}"],
        checkpoint=lambda: "W/it1/checkpoints/5000", warn=said.append,
    )  # fmt: skip
    return looking, said


def sums(loss=2.0, skipped=0.0):
    return {"skipped": (skipped, 1.0), "loss": (8 * loss, 8.0), "gradient_norm": (3.0, 1.0)}


def test_skipped_steps_are_counted_with_their_utterances_and_too_many_end_the_run():
    looking, said = watched()
    for n in range(watch.MAX_SKIPPED):
        looking.step(100 + n, sums(skipped=1.0))
    assert "step 109: loss or gradient is not finite" in said[-1]
    assert "10 such steps" in said[-1] and said[-1].endswith("ann/109, bob/109")
    with pytest.raises(watch.Diverged, match=r"11 of the last 200 .* W/it1/checkpoints/5000"):
        looking.step(110, sums(skipped=1.0))


def test_rare_skipped_steps_do_not_end_the_run():
    looking, said = watched()
    apart = watch.WINDOW // watch.MAX_SKIPPED
    for n in range(5 * watch.WINDOW):
        looking.step(n, sums(skipped=float(n % apart == 0)))
    assert len(said) == 5 * watch.MAX_SKIPPED


def test_a_jump_of_the_loss_is_reported_once_and_noise_and_descent_are_not():
    looking, said = watched()
    rng = np.random.default_rng(0)
    for n in range(2000):
        looking.step(n, sums(2.0 + 3.0 * np.exp(-n / 300) + 0.1 * rng.normal()))
    assert not said
    for n in range(2000, 2020):
        looking.step(n, sums(4.0))
    assert len(said) == 1 and "step 2000: the loss jumped to 4.000" in said[0]
    assert "ann/2000" in said[0]


def test_findings_are_said_once_until_they_have_gone():
    looking, said = watched()
    for n, findings in enumerate([["a"], ["a"], [], ["a", "b"], ["b"]]):
        looking.say(n, findings)
    assert [line.rsplit(" ", 1)[1] for line in said] == ["a", "a", "b"]


def test_a_model_of_one_code_and_collapsed_features_are_told_from_a_new_model():
    """From real logits: a new model, one whose codes are equal but for one, one without frames."""
    made = tiny.model(num_codes=(12,))
    data = batch()

    def values(model):
        found = jax.device_get(jax.jit(pretraining.evaluate)(model, data, jax.random.key(0)))
        sums, usages = found
        return train.means(train.sum_metrics([sums])) | watch.usage([usages])

    new = values(made)
    assert not watch.of_training(new) and new["codes_labelled"] == 12
    assert new["logit_spread"] > watch.SAME_LOGITS
    assert 0.1 < new["feature_spread"] < 1 and not watch.of_validation(new)

    constant = tiny.model(num_codes=(12,))  # whatever the audio, the bias alone
    constant.head.kernel[...] = jnp.zeros_like(constant.head.kernel[...])
    constant.head.bias[...] = jnp.ones_like(constant.head.bias[...])
    got = values(constant)
    assert got["codes_predicted"] == 1 and got["logit_spread"] == pytest.approx(0.0, abs=1e-4)
    assert "predicts one code" in watch.of_training(got)[0]
    assert got["feature_spread"] > watch.SAME_FEATURES
    (finding,) = watch.of_validation(got)
    assert "the predictions have collapsed" in finding
    got["logit_spread"] = 1.0
    assert "one code" in watch.of_validation(got)[0]
    got |= {"codes_predicted": 3.0, "codes_labelled": 100.0}
    assert "dead" in watch.of_validation(got)[0]
    got["codes_predicted"] = 60.0
    assert not watch.of_validation(got)


@pytest.mark.parametrize(("scale", "collapsed"), [(1e-3, True), (0.1, False)])
def test_features_that_are_nearly_the_same_for_all_frames_have_collapsed(scale, collapsed):
    """Of the audio the last norm lets this much through, beside a bias of 1."""
    got = with_last_norm(scale, bias=1.0)
    assert 0.2 * scale < got["feature_spread"] < 1.1 * scale
    assert collapsed == any("features have collapsed" in said for said in watch.of_validation(got))


def test_features_of_zeros_have_collapsed():
    got = with_last_norm(0.0, bias=0.0)
    assert got["feature_spread"] == 0
    assert "features have collapsed" in watch.of_validation(got)[0]


def with_last_norm(scale: float, *, bias: float) -> dict[str, float]:
    """What validation finds of a model whose last norm has these parameters."""
    made = tiny.model(num_codes=(12,))
    last = made.encoder.layers.ffn_norm
    last.scale[...] = last.scale[...].at[-1].set(scale)
    last.bias[...] = last.bias[...].at[-1].set(bias)
    sums, usages = jax.device_get(pretraining.evaluate(made, batch(), jax.random.key(0)))
    return train.means(train.sum_metrics([sums])) | watch.usage([usages])
