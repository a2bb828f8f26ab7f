# SPDX-License-Identifier: Apache-2.0
"""One utterance, one result: alone, beside longer ones, in any order; and few shapes to compile.

B batch, S samples, T frames, D width, N utterances, L layers: from 0, the input of the first
"""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hubert_jax import encode, extract, model, sharding, weights
from hubert_jax.data import padding
from hubert_jax.ops import frames, windows
from tests import tiny

TOLERANCE = 1e-5  # in float32, at every layer
LONGEST = 48_000  # samples: 149 frames, more than the 128 that the position convolution sees
UNPADDED = (400, 720, 20_880, 46_334)  # each compiles once more
BOUNDARIES = (*UNPADDED, 401, 719, 721, 1_039, 1_040, 20_879, 41_039, 41_040, LONGEST - 1, LONGEST)
NUM_UTTERANCES = 200
ALONE = np.array([16_000, LONGEST])  # padded lengths of an utterance alone

_rng = np.random.default_rng(7)
LENGTHS_N = np.concatenate(
    [BOUNDARIES, _rng.integers(400, LONGEST, NUM_UTTERANCES - len(BOUNDARIES))]
)
WAVES = [
    (_rng.uniform(0.1, 1.0) * _rng.standard_normal(num_samples)).astype(np.float32)
    for num_samples in LENGTHS_N
]


@pytest.fixture(scope="module", params=tiny.KINDS)
def encoder(request):
    return random_encoder(request.param, num_layers=2)


def random_encoder(kind: str, *, num_layers: int) -> model.Encoder:
    """Its norms are not 1 and 0 and its attention is not flat; drawn by numpy, which is quicker."""
    config = dataclasses.replace(tiny.KINDS[kind], num_layers=num_layers)
    abstract = jax.eval_shape(lambda key: model.Encoder(config, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    arrays = {}
    for name, like in weights.to_named(abstract).items():
        noise = rng.standard_normal(like.shape)
        if name.endswith("scale"):
            array = 1 + 0.3 * noise
        elif name.endswith("gain_P"):
            array = 0.5 + 0.1 * noise
        elif name.endswith("bias"):
            array = 0.3 * noise
        elif name.startswith("layers."):
            array = 0.1 * noise
        else:  # of the size that they start with
            variance = 2 if ".convs." in name else 1 / 3
            array = noise * np.sqrt(variance / math.prod(like.shape[:-1]))
        arrays[name] = array.astype(np.float32)
    return jax.tree.map(jnp.asarray, weights.from_named(abstract, arrays))


@functools.partial(jax.jit, static_argnames="padding")
def all_layers(encoder, wave_BS, num_samples_B, *, padding="exact"):
    """What every layer gives: (L, B, T, D)."""
    options = dict(num_samples_B=num_samples_B, padding=padding)
    layers = range(encoder.config.num_layers + 1)
    return jnp.stack([encoder.features(wave_BS, layer=layer, **options) for layer in layers])


def batched(encoder, order_N, *, num_rows, num_samples, filling=0.0, padding="exact") -> dict:
    """Features (L, T, D) of utterances, in batches of this shape, as they come in `order_N`."""
    found, rng = {}, np.random.default_rng(1)
    for members in np.split(order_N, range(num_rows, len(order_N), num_rows)):
        wave_BS = filling * rng.standard_normal((num_rows, num_samples)).astype(np.float32)
        for row, utterance in enumerate(members):
            wave_BS[row, : LENGTHS_N[utterance]] = WAVES[utterance]
        features_LBTD = np.asarray(
            all_layers(encoder, wave_BS, LENGTHS_N[members], padding=padding)
        )  # cut by numpy: jax would compile every cut
        for row, utterance in enumerate(members):
            num_frames = frames.num_frames(int(LENGTHS_N[utterance]))
            found[utterance] = features_LBTD[:, row, :num_frames]
    return found


@pytest.fixture(scope="module")
def alone(encoder) -> dict:
    """Every utterance in a batch of its own, padded to the next of a few lengths."""
    found = {}
    for rung in ALONE:
        members = np.flatnonzero(ALONE[np.searchsorted(ALONE, LENGTHS_N)] == rung)
        found |= batched(encoder, members, num_rows=1, num_samples=int(rung))
    return found


def differences(found: dict, wanted: dict) -> np.ndarray:
    """The largest one of each utterance in `found` at each layer: (N, L)."""
    return np.array([np.abs(found[n] - wanted[n]).max(axis=(1, 2)) for n in sorted(found)])


# --- one utterance, one result


def test_padding_changes_nothing_of_an_utterance_alone(encoder, alone):
    for utterance, num_samples in enumerate(UNPADDED):
        want_LTD = np.asarray(all_layers(encoder, WAVES[utterance][None], None))[:, 0]
        assert want_LTD.shape == (3, frames.num_frames(num_samples), 32)
        np.testing.assert_allclose(alone[utterance], want_LTD, rtol=0, atol=TOLERANCE)
    # the layers are so many different things, of size 1 or so
    assert np.std(want_LTD, axis=(1, 2)).min() > 0.3
    assert np.abs(np.diff(want_LTD, axis=0)).max(axis=(1, 2)).min() > 0.3


def test_200_utterances_are_the_same_beside_longer_ones_and_in_another_order(encoder, alone):
    order_N, other_N = (np.random.default_rng(seed).permutation(NUM_UTTERANCES) for seed in (1, 2))
    together = batched(encoder, order_N, num_rows=8, num_samples=LONGEST)
    assert sorted(together) == sorted(alone) == list(range(NUM_UTTERANCES))
    assert differences(together, alone).max() <= TOLERANCE
    # other neighbours, more of them, a longer batch, and noise after the end: it is not heard
    others = batched(encoder, other_N, num_rows=10, num_samples=LONGEST + 3_333, filling=1.0)
    assert differences(others, alone).max() <= TOLERANCE
    assert differences(others, together).max() <= TOLERANCE


def test_reference_padding_fails_the_same_check(encoder, alone):
    order_N = np.arange(96)
    options = dict(num_rows=8, num_samples=LONGEST, padding="reference")
    different_NL = differences(batched(encoder, order_N, **options), alone)
    lengths_N = LENGTHS_N[order_N]
    # its rule of thumb often takes a frame too many for real; base's norm hears silence as well
    valid_NT = model.valid_frames(LONGEST, lengths_N, padding="reference")
    same_N = np.asarray(valid_NT.sum(axis=1)) == frames.num_frames(lengths_N)
    assert 5 < same_N.sum() < len(order_N) - 5
    if encoder.config.conv_norm == "group":
        assert different_NL[lengths_N < 0.9 * LONGEST].min() > 100 * TOLERANCE
    else:
        assert different_NL[~same_N].min() > 100 * TOLERANCE
        assert different_NL[same_N].max() <= TOLERANCE


# --- the number of frames


def test_frames_of_every_length_are_those_of_the_formula():
    lengths_N = np.arange(400, 4_001)
    formula_N = (lengths_N - 400) // 320 + 1
    np.testing.assert_array_equal(frames.num_frames(lengths_N), formula_N)
    np.testing.assert_array_equal(frames.conv_lengths(lengths_N)[-1], formula_N)
    valid_NT = model.valid_frames(4_000, lengths_N, padding="exact")
    np.testing.assert_array_equal(valid_NT.sum(axis=1), formula_N)

    convolved_N = lengths_N
    for conv in random_encoder("base", num_layers=1).extractor.convs:
        distinct, place_N = np.unique(convolved_N, return_inverse=True)
        width = conv.kernel.shape[1]
        inputs = [jax.ShapeDtypeStruct((1, length, width), jnp.float32) for length in distinct]
        outputs = jax.eval_shape(lambda inputs, conv=conv: [conv(x) for x in inputs], inputs)
        convolved_N = np.array([x_BTC.shape[1] for x_BTC in outputs])[place_N]
    np.testing.assert_array_equal(convolved_N, formula_N)


def test_frames_of_the_encoder_change_where_the_formula_says(encoder):
    """Norms and GELU keep the shape; tracing them takes too long for every length."""
    for num_frames in range(1, 12):
        first = frames.num_samples(num_frames)
        for length in (first, first + frames.HOP - 1):
            wave_BS = jax.ShapeDtypeStruct((1, length), jnp.float32)
            assert jax.eval_shape(encoder.extract, wave_BS).shape == (1, num_frames, 16)


# --- every shape compiled once


COMPILATION = "/jax/core/compile/backend_compile_duration"  # one event for each, of any function


@contextlib.contextmanager
def compilations():
    """A list of the functions that XLA compiles meanwhile."""
    compiled: list[str] = []

    def listen(event, seconds, *, fun_name="", **facts):
        if event == COMPILATION:
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_call_compiles_each_rung_of_its_ladder_once():
    called = encode.Model(random_encoder("base", num_layers=1), {"step": 1})
    rng = np.random.default_rng(0)
    longest = frames.num_samples(windows.WINDOW)
    # the edges of every rung, one sample more than a window, and lengths in between
    edges = [400, 719, 720, *encode.LADDER[:-1], *(encode.LADDER[:-1] + 1), longest, longest + 1]
    lengths_N = np.concatenate([edges, np.geomspace(400, longest, 20).astype(int)])
    waves = [
        rng.standard_normal(length).astype(np.float32) for length in rng.permutation(lengths_N)
    ]
    with compilations() as first:
        for wave_S in waves:
            num_frames = min((len(wave_S) - 400) // 320 + 1, windows.WINDOW)
            assert called.features(wave_S, layer=1).shape == (num_frames, 32)
    assert first == ["jit(_layer)"] * len(encode.LADDER)
    with compilations() as second:
        for wave_S in waves[::-1]:
            called.features(wave_S, layer=1)
    assert second == []

    for wave_S, rate, got in ((waves[0][:399], 16_000, 399), (waves[0][:199], 8_000, 398)):
        message = rf"too short: {got} samples at 16 kHz, one frame takes 400 \(25 ms\)"
        with pytest.raises(ValueError, match=message):
            called.features(wave_S, layer=1, sample_rate=rate)


def test_recordings_compile_each_rung_once_and_come_the_same_in_another_order():
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.local_devices()[:1])
    network = random_encoder("large", num_layers=1)
    source = extract.layer_source(network, {"step": 1}, layer=1, mesh=mesh)
    ladder = np.array([4_000, 16_000, LONGEST])
    waves = {str(utterance): wave_S for utterance, wave_S in enumerate(WAVES[:80])}
    waves["short"] = WAVES[0][:399]

    def stream(ids) -> dict[str, encode.Part]:
        parts = encode.stream(
            source,
            [encode.Recording(id_, lambda id_=id_: [waves[id_]]) for id_ in ids],
            ladder=ladder,
            batch_seconds=8.0,
            max_rows=len(waves),
            mesh=mesh,
        )
        return {part.id: part for part in parts}

    with compilations() as first:
        found = stream(list(waves))
    assert first == ["jit(_layer)"] * len(ladder)
    with compilations() as second:
        other = stream(np.random.default_rng(2).permutation(list(waves)).tolist())
    assert second == []

    assert found["short"].rejected.startswith("too short: 399 samples")
    assert len(found["short"].features_TD) == 0
    for utterance, num_samples in enumerate(LENGTHS_N[:80].tolist()):
        features_TD = found[str(utterance)].features_TD
        assert len(features_TD) == (num_samples - 400) // 320 + 1
        np.testing.assert_allclose(
            other[str(utterance)].features_TD, features_TD, rtol=0, atol=TOLERANCE
        )


def test_a_corpus_compiles_each_rung_once_and_says_what_padding_costs(monkeypatch):
    monkeypatch.setattr(padding, "RUNG_SECONDS", 25.0)  # so few utterances would get one rung
    mesh = extract.local_mesh()
    network = random_encoder("base", num_layers=1)
    source = extract.layer_source(network, {"step": 1}, layer=1, mesh=mesh)
    shapes = []

    def compute(audio_BS, num_samples_B):
        shapes.append(audio_BS.shape)
        return source.compute(audio_BS, num_samples_B)

    extractor = extract.Extractor(
        source._replace(compute=functools.partial(compute)),
        LENGTHS_N,
        batch_seconds=40.0,
        mesh=mesh,
    )
    positions = np.arange(NUM_UTTERANCES)
    with compilations() as first:
        found = dict(extractor.stream(Split(), positions))
    assert first == ["jit(_layer)"] * len(set(shapes))
    assert {num_samples for _, num_samples in shapes} == set(padding.padded_lengths(LENGTHS_N))
    assert 2 < len(set(shapes)) <= padding.MAX_RUNGS
    for utterance, num_samples in enumerate(LENGTHS_N.tolist()):
        assert len(found[utterance]) == (num_samples - 400) // 320 + 1

    computed = sum(num_rows * num_samples for num_rows, num_samples in shapes)
    assert extractor.share_of_padding == pytest.approx(1 - LENGTHS_N.sum() / computed)
    assert 0 < extractor.share_of_padding < 1 - LENGTHS_N.mean() / LONGEST  # of a single rung

    with compilations() as second:  # half of the utterances have other neighbours
        half = dict(extractor.stream(Split(), positions[::-2]))
    assert second == []
    for utterance, features_TD in half.items():
        np.testing.assert_allclose(features_TD, found[utterance], rtol=0, atol=TOLERANCE)


class Split:
    """The utterances as a split in memory."""

    ids = tuple(map(str, range(NUM_UTTERANCES)))
    num_samples = LENGTHS_N

    def audio(self, position: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return WAVES[position][start:stop]
