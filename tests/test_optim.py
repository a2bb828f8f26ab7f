# SPDX-License-Identifier: Apache-2.0
"""AdamW is the reference's, written out in numpy; the schedule is the paper's."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hubert_jax import optim

CONFIG = optim.OptimConfig(
    peak_lr=0.1, warmup_steps=4, beta1=0.9, beta2=0.98, eps=1e-3, weight_decay=0.01, clip_norm=1.0
)


def reference_adamw(x, grads, config, num_steps):
    """fairseq/optim/adam.py: eps before the bias correction, decay times the learning rate."""
    mean, square = np.zeros_like(x), np.zeros_like(x)
    for n, grad in enumerate(grads, start=1):
        grad = grad * min(1.0, config.clip_norm / np.linalg.norm(grad))
        rise, fall = n / config.warmup_steps, (num_steps - n) / (num_steps - config.warmup_steps)
        lr = config.peak_lr * min(rise, fall)
        mean = config.beta1 * mean + (1 - config.beta1) * grad
        square = config.beta2 * square + (1 - config.beta2) * grad**2
        step_size = lr * np.sqrt(1 - config.beta2**n) / (1 - config.beta1**n)
        x = x - lr * config.weight_decay * x - step_size * mean / (np.sqrt(square) + config.eps)
    return x


def test_updates_are_the_reference():
    rng = np.random.default_rng(0)
    x, grads = rng.normal(size=5), rng.normal(size=(10, 5))
    optimizer = optim.adamw(CONFIG, num_steps=10)
    params = {"x": jnp.asarray(x, jnp.float32)}
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update({"x": jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["x"], reference_adamw(x, grads, CONFIG, 10), rtol=1e-5)


def test_eps_is_added_before_the_bias_correction():
    """optax's own Adam would give another first step, so the test above can fail."""
    params, grads = jnp.ones(1), jnp.full(1, 1e-3)
    ours = optim.scale_by_adam(b1=0.9, b2=0.98, eps=1e-3)
    theirs = optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-3)
    step, other = (t.update(grads, t.init(params))[0][0] for t in (ours, theirs))
    assert float(step) == pytest.approx(1 / (1 + 1 / np.sqrt(1 - 0.98)), rel=1e-4)
    assert float(other) == pytest.approx(0.5, rel=1e-4)


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    learning_rate = optim.schedule(CONFIG, num_steps=10)
    values = [float(learning_rate(n)) for n in range(10)]
    assert values[3] == pytest.approx(CONFIG.peak_lr) and max(values) == values[3]
    assert values[0] == pytest.approx(CONFIG.peak_lr / 4) and values[9] == 0


@pytest.mark.parametrize("num_steps", [3, 4])
def test_warm_up_has_to_fit(num_steps):
    with pytest.raises(ValueError, match=r"optim.warmup_steps is 4, but training has"):
        optim.schedule(CONFIG, num_steps=num_steps)
