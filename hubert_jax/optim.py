# SPDX-License-Identifier: Apache-2.0
"""AdamW as the reference has it: decay on every parameter, linear warm-up, linear decay to 0.

Source: fairseq's adam.py and polynomial_decay_schedule.py with HuBERT's settings.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    peak_lr: float
    warmup_steps: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float  # of the global gradient; 0 switches it off


def adamw(config: OptimConfig, *, num_steps: int) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, schedule: an optax transformation over `num_steps` updates."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, num_steps=num_steps)),
    )


def schedule(config: OptimConfig, *, num_steps: int) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: up to the peak, then straight down to 0.

    Raises ValueError when the warm-up does not end before the last step.
    """
    if not 0 < config.warmup_steps < num_steps:
        raise ValueError(
            f"optim.warmup_steps is {config.warmup_steps}, but training has {num_steps} steps:"
            " choose a warm-up between 1 and train.num_steps - 1"
        )

    def learning_rate(count):
        update = count + 1
        rising = update / config.warmup_steps
        falling = (num_steps - update) / (num_steps - config.warmup_steps)
        return config.peak_lr * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

    return learning_rate


def scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with eps added before the bias correction, as in fairseq and the Adam paper's section 2.

    optax.scale_by_adam adds it afterwards, which is a seventh of this eps at the first update for
    b2 = 0.98. State and state layout are optax's own.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32), mu=zeros, nu=jax.tree.map(jnp.zeros_like, params)
        )

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)
