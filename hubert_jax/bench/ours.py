# SPDX-License-Identifier: Apache-2.0
"""What is ours in the bench: each function gives a contender, whose work ends when it returns.

B batch, S samples, T frames, N rows, D width, C codes
"""

import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hubert_jax import optim, pretraining, sharding, train
from hubert_jax.bench.timing import Contender, Work
from hubert_jax.heads import HeadConfig, Hubert
from hubert_jax.model import Encoder, HubertConfig
from hubert_jax.ops import frames, kmeans, losses, mfcc

NAME = "hubert_jax"


def training(
    config: HubertConfig, head: HeadConfig, optimizer: optim.OptimConfig, wave_BS, labels_BT
) -> Contender:
    """One update on all devices: masks, forward, backward, clipping, AdamW."""
    num_codes, num_steps = int(labels_BT.max()) + 1, 10 * optimizer.warmup_steps

    def prepare() -> Work:
        mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
        adamw = optim.adamw(optimizer, num_steps=num_steps)
        loss = functools.partial(
            pretraining.loss, config=pretraining.LossConfig(10.0, 0.0, 0.0), num_steps=num_steps
        )
        step = train.make_step(loss, adamw, accumulate=1)
        key = jax.random.key(0)
        batch = {
            "audio": wave_BS, "labels": labels_BT[..., None],
            "weights": np.ones(len(wave_BS), np.float32),
        }  # fmt: skip
        with jax.set_mesh(mesh):
            make = functools.partial(_hubert, config, head, num_codes)
            state = train.init_state(sharding.make_sharded(make, key, mesh), adamw)
            placed = sharding.put_batch(mesh, batch)

        def work():
            nonlocal state
            with jax.set_mesh(mesh):
                state, metrics = step(state, placed, key)
            return jax.block_until_ready(metrics["loss"])

        return work

    return Contender(NAME, prepare)


def _hubert(config: HubertConfig, head: HeadConfig, num_codes: int, key) -> Hubert:
    return Hubert(config, head, (num_codes,), key=key)


def extraction(config: HubertConfig, wave_BS, *, layer: int) -> Contender:
    """Features of a layer, from samples on the host to numpy."""

    def prepare() -> Work:
        encoder = jax.jit(lambda key: Encoder(config, key=key))(jax.random.key(0))
        compute = jax.jit(lambda encoder, wave_BS: encoder.features(wave_BS, layer=layer))
        return lambda: np.asarray(compute(encoder, wave_BS))

    return Contender(NAME, prepare)


def fit(features_ND, config: kmeans.KMeansConfig, centers: dict[str, np.ndarray]) -> Contender:
    """A codebook, which goes into `centers`."""
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)

    def work():
        found = kmeans.fit([features_ND], config, seed=0, sharding=sharding.batch_sharding(mesh))
        centers[NAME] = found.centers_CD

    return Contender(NAME, lambda: work)


def inertia(features_ND, centers_CD) -> float:
    """Mean squared distance of a row to its nearest centre, in float64 from float32 distances."""
    codes_N = np.asarray(jax.jit(kmeans.assign)(features_ND, centers_CD))
    return float(np.mean(np.sum(np.square(features_ND - centers_CD[codes_N], dtype=float), axis=1)))


def assignment(features_ND, centers_CD) -> Contender:
    def prepare() -> Work:
        assign = jax.jit(kmeans.assign)
        return lambda: np.asarray(assign(features_ND, centers_CD))

    return Contender(NAME, prepare)


def mfccs(wave_S) -> Contender:
    def prepare() -> Work:
        compute = jax.jit(mfcc.mfcc39)
        return lambda: np.asarray(compute(wave_S))

    return Contender(NAME, prepare)


def parts(config: HubertConfig, head: HeadConfig, wave_BS, labels_BT) -> Iterator[Contender]:
    """Forward, and forward with backward, of each part alone on inputs of its own shape."""
    hubert = jax.jit(functools.partial(_hubert, config, head, int(labels_BT.max()) + 1))(
        jax.random.key(0)
    )
    encoder = hubert.encoder
    x_BTD = jax.random.normal(jax.random.key(1), (*labels_BT.shape, config.width), config.dtype)
    mask_BT = np.random.default_rng(0).random(labels_BT.shape) < 0.567

    def layers(encoder, x_BTD):
        return encoder._run_layers(x_BTD, None, None, jax.random.key(0))

    def predict(head, x_BTD):
        (logits_BTC,) = head(x_BTD)
        return losses.prediction(logits_BTC, labels_BT, mask_BT, jnp.ones(len(x_BTD))).masked_loss

    for name, function, module, x in (
        ("extractor", lambda encoder, wave_BS: encoder.extract(wave_BS), encoder, wave_BS),
        ("position convolution", lambda position, x_BTD: position(x_BTD), encoder.position, x_BTD),
        (f"{config.num_layers} layers", layers, encoder, x_BTD),
        ("head and loss", predict, hubert.head, x_BTD),
    ):
        yield Contender(f"{name}, forward", functools.partial(_run, function, module, x))
        summed = functools.partial(_sum_of_squares, function)
        # no gradient for samples, which are no activations
        wanted = (0,) if x is wave_BS else (0, 1)
        gradient = jax.grad(summed, argnums=wanted)
        yield Contender(f"{name}, forward + backward", functools.partial(_run, gradient, module, x))


def _sum_of_squares(function, module, x):
    return jnp.sum(jnp.square(function(module, x).astype(jnp.float32)))


def _run(function, module, x) -> Work:
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(module, x))


def matmul_peak(dtype: str, *, size: int = 4096, rounds: int = 5) -> float:
    """Operations per second of the best of a few square matmuls, on one device."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        multiply(x).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def audio(rows: int, seconds: float, num_codes: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise and labels: wave_BS, labels_BT."""
    rng = np.random.default_rng(0)
    num_samples = round(seconds * frames.SAMPLE_RATE)
    wave_BS = rng.normal(size=(rows, num_samples)).astype(np.float32)
    return wave_BS, rng.integers(num_codes, size=(rows, frames.num_frames(num_samples)))
