# SPDX-License-Identifier: Apache-2.0
"""The one loop. It knows models, batches and time, and nothing of speech.

`make_step` turns a loss into a compiled update, `fit` repeats it: batches come from an iterator
that is indexed by the step, randomness from fold_in(key, step), so a run that stops and starts
again is the same run.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hubert_jax import sharding, stopping

# Products by cuBLAS alone, which adds a bias on the way; XLA's own would be tried out beside them,
# which doubles the time that compiling takes (docs/LOG.md).
ON_HOPPER = {"xla_gpu_enable_triton_gemm": False}


class State(NamedTuple):
    """All that training carries from step to step."""

    step: jax.Array  # int32, updates made so far
    model: object
    opt_state: optax.OptState


class Loss(NamedTuple):
    """A loss as a sum and the count to divide it by, so that parts of a batch simply add up."""

    total: jax.Array
    weight: jax.Array  # does not depend on the parameters
    metrics: dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


Sums = dict[str, tuple[float, float]]  # name -> (sum, count), on the host
LossFunction = Callable[..., Loss]  # (model, batch, key, step) -> Loss


def init_state(model, optimizer: optax.GradientTransformation) -> State:
    """Step 0. The optimiser's moments take over the sharding of the parameters."""
    return State(jnp.zeros([], jnp.int32), model, optimizer.init(model))


def make_step(loss: LossFunction, optimizer: optax.GradientTransformation, *, accumulate: int):
    """A compiled (state, batch, key) -> (state, metrics).

    `accumulate` splits the rows of the batch into that many parts, one after the other; gradients
    are summed before the one division by the summed weight, so the update is that of the whole
    batch. Metrics gain the loss per count and the gradient's norm before clipping.

    A step whose loss or gradient is not finite leaves model and optimiser as they were; its metrics
    are 0 of 0, and it is counted in "skipped".
    """

    def gradient_of_sum(model, batch, key, step) -> tuple[Any, Loss]:
        def total(model) -> tuple[jax.Array, Loss]:
            value = loss(model, batch, key, step)
            return value.total, value

        return jax.grad(total, has_aux=True)(model)

    def summed(model, batch, key, step):
        if accumulate == 1:
            return gradient_of_sum(model, batch, key, step)
        parts = jax.tree.map(lambda x: _split_rows(x, accumulate), batch)
        keys = jax.random.split(key, accumulate)

        def add(total, batch_and_key):
            batch, key = batch_and_key
            return jax.tree.map(jnp.add, total, gradient_of_sum(model, batch, key, step)), None

        # All parts in the loop: one before it would be held beside those in it (docs/SCALING.md).
        shapes = jax.eval_shape(
            lambda: gradient_of_sum(model, jax.tree.map(lambda x: x[0], parts), keys[0], step)
        )
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, nothing, (parts, keys))[0]

    def step(state: State, batch, key):
        key = jax.random.fold_in(key, state.step)
        grads, value = summed(state.model, batch, key, state.step)
        grads = jax.tree.map(lambda g: g / value.weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        norm = optax.tree.norm(grads)
        metrics = value.metrics | {
            "loss": (value.total, value.weight),
            "gradient_norm": (norm, 1.0),
        }
        is_finite = jnp.isfinite(value.total) & jnp.isfinite(norm)
        model, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (model, opt_state),
            (state.model, state.opt_state),
        )
        metrics = jax.tree.map(lambda x: jnp.where(is_finite, x, 0.0), metrics)
        metrics["skipped"] = ((~is_finite).astype(jnp.float32), 1.0)
        return State(state.step + 1, model, opt_state), metrics

    options = ON_HOPPER if sharding.is_hopper() else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def _split_rows(x, parts: int):
    """(B, ...) -> (parts, B / parts, ...); part i takes rows i, i + parts, ... of every device."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the state has been saved, if there was any step."""


def fit(
    state: State,
    step: Callable,
    batches: Iterator[tuple[int, object]],
    *,
    key,
    num_steps: int,
    report: Callable[[int, Sums, float, float], None],
    report_every: int,
    validate: Callable[[State], None],
    validate_every: int,
    save: Callable[[State], None],
    save_every: int,
    watch: Callable[[int, Sums], None] = lambda step, sums: None,
    validate_first: bool = False,
) -> State:
    """Updates until `num_steps`, from batches that start at the state's own step.

    `report(step, metrics, seconds, waited)` gets the sums since the last report, read one step
    late so that the device never waits for the host, with the wall time and the seconds spent
    waiting for batches. Before that, `watch(step, metrics)` sees each of these steps alone; what it
    raises ends training. What is saved is saved before it is validated; `validate_first` makes up
    for a validation that was stopped. Raises Interrupted after a signal, once the state is saved.
    """
    first = done = int(state.step)
    pending: list = []
    waited, since = 0.0, time.perf_counter()

    def report_first(count: int) -> None:
        """Of the steps that are pending, those that came first."""
        nonlocal pending, waited, since
        if not count:
            return
        ready = jax.device_get(pending[:count])
        for number, values in enumerate(ready, start=done - len(pending) + 1):
            watch(number, values)
        now = time.perf_counter()
        report(done - len(pending) + count, sum_metrics(ready), now - since, waited)
        pending, waited, since = pending[count:], 0.0, now

    try:
        with stopping.listening():
            if validate_first:
                validate(state)
                since = time.perf_counter()
            while done < num_steps:
                stopping.heed()
                asked = time.perf_counter()
                _, batch = next(batches)
                waited += time.perf_counter() - asked
                state, metrics = step(state, batch, key)
                done += 1
                pending.append(metrics)
                if done % report_every == 0 or done == num_steps:
                    report_first(len(pending) - (done < num_steps))
                if done % save_every == 0 or done == num_steps:
                    save(state)
                if is_validated_after(done, every=validate_every, num_steps=num_steps):
                    start = time.perf_counter()
                    validate(state)
                    since += time.perf_counter() - start
            stopping.heed()
    except stopping.Stop as stop:
        if done > first:
            save(state)
        report_first(len(pending))
        when = f"after step {done}; it is saved" if done else "before its first step"
        raise Interrupted(f"stopped by {stop} {when}") from None
    return state


def is_validated_after(step: int, *, every: int, num_steps: int) -> bool:
    return step % every == 0 or step == num_steps


def sum_metrics(metrics: list[dict]) -> Sums:
    """The (sum, count) pairs of several steps, added up by name."""

    def total(name: str, part: int) -> float:
        return float(sum(step[name][part] for step in metrics))

    return {name: (total(name, 0), total(name, 1)) for name in metrics[0]}


def means(sums: Sums) -> dict[str, float]:
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}
