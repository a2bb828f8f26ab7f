# SPDX-License-Identifier: Apache-2.0
"""What is ours in the bench: each function gives a contender, whose work ends when it returns.

B batch, S samples, T frames, D width, C codes
"""

import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hubert_jax import optim, pretraining, sharding, train
from hubert_jax.bench.timing import Contender, Work
from hubert_jax.heads import HeadConfig, Hubert
from hubert_jax.model import Encoder, HubertConfig
from hubert_jax.ops import frames, losses, mfcc

NAME = "hubert_jax"


def training(
    config: HubertConfig, head: HeadConfig, optimizer: optim.OptimConfig, wave_BS, labels_BT
) -> Contender:
    """One update on all devices: masks, forward, backward, clipping, AdamW."""

    def prepare() -> Work:
        mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
        step = train.make_step(_loss(optimizer), _adamw(optimizer), accumulate=1)
        key = jax.random.key(0)
        with jax.set_mesh(mesh):
            carried = state(config, head, optimizer, int(labels_BT.max()) + 1, mesh)
            placed = sharding.put_batch(mesh, batch(wave_BS, labels_BT))

        def work():
            nonlocal carried
            with jax.set_mesh(mesh):
                carried, metrics = step(carried, placed, key)
            return jax.block_until_ready(metrics["loss"])

        return work

    return Contender(NAME, prepare)


def state(
    config: HubertConfig, head: HeadConfig, optimizer: optim.OptimConfig, num_codes: int, mesh
) -> train.State:
    """Step 0 of a training; within `jax.set_mesh(mesh)`."""
    make = functools.partial(_hubert, config, head, num_codes)
    model = sharding.make_sharded(make, jax.random.key(0), mesh)
    return train.init_state(model, _adamw(optimizer))


def batch(wave_BS, labels_BT) -> dict[str, np.ndarray]:
    weights_B = np.ones(len(wave_BS), np.float32)
    return {"audio": wave_BS, "labels": labels_BT[..., None], "weights": weights_B}


def _hubert(config: HubertConfig, head: HeadConfig, num_codes: int, key) -> Hubert:
    return Hubert(config, head, (num_codes,), key=key)


def _num_steps(optimizer: optim.OptimConfig) -> int:
    return 10 * optimizer.warmup_steps


def _adamw(optimizer: optim.OptimConfig) -> optax.GradientTransformation:
    return optim.adamw(optimizer, num_steps=_num_steps(optimizer))


def _loss(optimizer: optim.OptimConfig) -> train.LossFunction:
    config = pretraining.LossConfig(10.0, 0.0, 0.0)
    return functools.partial(pretraining.loss, config=config, num_steps=_num_steps(optimizer))


def extraction(config: HubertConfig, wave_BS, *, layer: int) -> Contender:
    """Features of a layer, from samples on the host to numpy."""

    def prepare() -> Work:
        encoder = jax.jit(lambda key: Encoder(config, key=key))(jax.random.key(0)).apart()
        compute = jax.jit(lambda encoder, wave_BS: encoder.features(wave_BS, layer=layer))
        return lambda: np.asarray(compute(encoder, wave_BS))

    return Contender(NAME, prepare)


def mfccs(wave_S) -> Contender:
    def prepare() -> Work:
        compute = jax.jit(mfcc.mfcc39)
        return lambda: np.asarray(compute(wave_S))

    return Contender(NAME, prepare)


# Where the time of a step goes.


def parts(
    config: HubertConfig, head: HeadConfig, optimizer: optim.OptimConfig, wave_BS, labels_BT
) -> Iterator[Contender]:
    """The whole step first; then forward, and forward with backward, of all and of each part.

    The parts run alone on inputs of their own shape, the optimiser on gradients that are there.
    """
    yield training(config, head, optimizer, wave_BS, labels_BT)._replace(name="whole step")
    num_codes = int(labels_BT.max()) + 1
    hubert = jax.jit(functools.partial(_hubert, config, head, num_codes))(jax.random.key(0))
    encoder = hubert.encoder
    x_BTD = jax.random.normal(jax.random.key(1), (*labels_BT.shape, config.width), config.dtype)
    mask_BT = np.random.default_rng(0).random(labels_BT.shape) < 0.567
    loss, key = _loss(optimizer), jax.random.key(0)

    def whole(hubert, given):
        return loss(hubert, given, key, jnp.zeros([], jnp.int32)).total

    def layers(encoder, x_BTD):
        return encoder._run_layers(x_BTD, None, None, key)

    def predict(head, x_BTD):
        (logits_BTC,) = head(x_BTD)
        return losses.prediction(logits_BTC, labels_BT, mask_BT, jnp.ones(len(x_BTD))).masked_loss

    for name, function, module, x in (
        ("model and loss", whole, hubert, batch(wave_BS, labels_BT)),
        ("extractor", lambda encoder, wave_BS: encoder.extract(wave_BS), encoder, wave_BS),
        ("position convolution", lambda position, x_BTD: position(x_BTD), encoder.position, x_BTD),
        (f"{config.num_layers} layers", layers, encoder, x_BTD),
        ("head and loss", predict, hubert.head, x_BTD),
    ):
        yield Contender(f"{name}, forward", functools.partial(_run, function, module, x))
        summed = functools.partial(_sum_of_squares, function)
        # no gradient for samples, which are no activations
        gradient = jax.grad(summed, argnums=(0, 1) if x is x_BTD else 0)
        yield Contender(f"{name}, forward + backward", functools.partial(_run, gradient, module, x))
    yield Contender("clipping and AdamW", functools.partial(_update, optimizer, hubert))


def _sum_of_squares(function, module, x):
    return jnp.sum(jnp.square(function(module, x).astype(jnp.float32)))


def _run(function, module, x) -> Work:
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(module, x))


def _update(optimizer: optim.OptimConfig, hubert: Hubert) -> Work:
    """One update in place, as in a step."""
    adamw = _adamw(optimizer)
    gradients = jax.tree.map(lambda x: 1e-3 * x, hubert)
    carried = (jax.tree.map(jnp.copy, hubert), adamw.init(hubert))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carried, gradients):
        hubert, moments = carried
        updates, moments = adamw.update(gradients, moments, hubert)
        return optax.apply_updates(hubert, updates), moments

    def work():
        nonlocal carried
        carried = jax.block_until_ready(update(carried, gradients))

    return work


# What the bench works on, and what the machine could do at best.


@functools.cache  # one for a table, and the one that its JSON has
def matmul_peak(dtype: str, *, rounds: int = 5) -> float:
    """Operations per second of the best of a few square matmuls, on one device.

    Of random numbers: zeros and ones draw less power, and a GPU multiplies them faster. On a CPU
    they fit its caches; on a GPU they are larger and several at a time, lest the call itself count.
    """
    sizes = (1024, 1536, 2048) if jax.default_backend() == "cpu" else (8192,)
    return max(_matmul_rate(size, dtype, rounds=rounds) for size in sizes)


def _matmul_rate(size: int, dtype: str, *, rounds: int) -> float:
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    scaled = x / size**0.5  # products keep the variance

    @jax.jit
    def multiply(x, scaled):
        return jax.lax.fori_loop(0, 10, lambda _, x: x @ scaled, x)

    multiply(x, scaled).block_until_ready()
    best = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        multiply(x, scaled).block_until_ready()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


def num_samples(seconds: float) -> int:
    return round(seconds * frames.SAMPLE_RATE)


def audio(rows: int, seconds: float, num_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise and labels: wave_BS, labels_BT."""
    rng = np.random.default_rng(0)
    length = num_samples(seconds)
    wave_BS = rng.normal(size=(rows, length)).astype(np.float32)
    return wave_BS, rng.integers(num_codes, size=(rows, frames.num_frames(length)))
