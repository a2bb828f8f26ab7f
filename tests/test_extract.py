# SPDX-License-Identifier: Apache-2.0
"""Streaming features: each utterance once, and the same numbers as of the utterance alone."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from hubert_jax import config_files, extract, model, stopping
from hubert_jax.ops import frames, mfcc
from tests.test_padding import compilations

LENGTHS = np.array([9_000, 399, 4_000, 9_000, 1_300, 400, 7_321, 2_000, 6_400, 5_555])


class Waves:
    """A split in memory."""

    def __init__(self, lengths=LENGTHS):
        rng = np.random.default_rng(0)
        self.ids = [f"u{number}" for number in range(len(lengths))]
        self.num_samples = np.asarray(lengths)
        self.waves = [0.1 * rng.standard_normal(n).astype(np.float32) for n in lengths]

    def audio(self, position, start=0, stop=None):
        return self.waves[position][start:stop]


@pytest.fixture(scope="module")
def mesh():
    return extract.local_mesh()


@pytest.fixture(scope="module")
def mfcc_source(mesh, tmp_path_factory):
    return extract.load_source(config(kind="mfcc"), tmp_path_factory.mktemp("work"), mesh)


def config(**fields) -> extract.FeaturesConfig:
    given = dict(checkpoint="", layer=0, sample_share=1.0, dtype="float32", batch_seconds=1.0,
                 num_shards=1, dump=False)  # fmt: skip
    return extract.FeaturesConfig(**(given | fields))


def encoder(**fields) -> model.Encoder:
    """A very small encoder with random parameters, drawn by numpy: quicker than its own init."""
    path = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"
    small = dict(conv_width=4, width=8, ffn_width=8, num_heads=1, num_layers=1, position_groups=1)
    fields = config_files.load(str(path)).model.to_dict() | small | fields
    make = functools.partial(model.Encoder, model.HubertConfig(**fields))
    abstract = jax.eval_shape(lambda key: make(key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)


def streamed(source, mesh, *, batch_seconds, positions=None, waves=None, **options):
    waves = waves or Waves()
    positions = np.arange(len(waves.ids)) if positions is None else positions
    extractor = extract.Extractor(source, waves.num_samples, batch_seconds=batch_seconds, mesh=mesh)
    pairs = list(extractor.stream(waves, positions, **options))
    assert sorted(position for position, _ in pairs) == sorted(positions.tolist())
    return dict(pairs), extractor


@pytest.mark.parametrize("batch_seconds", [0.1, 5.0])
def test_mfcc_of_every_utterance_as_if_alone(mfcc_source, mesh, batch_seconds):
    found, extractor = streamed(mfcc_source, mesh, batch_seconds=batch_seconds)
    for position, audio_S in enumerate(Waves().waves):
        assert found[position].shape == (frames.num_frames(len(audio_S), hop=160), 39)
        if position in (3, 6):
            alone_TD = jax.jit(mfcc.mfcc39)(audio_S)
            np.testing.assert_allclose(found[position], alone_TD, atol=1e-4)
    assert found[1].shape == (0, 39)  # 399 samples
    assert extractor.samples_read == LENGTHS.sum() and 0 < extractor.share_of_padding < 1


def test_a_layer_of_every_utterance_as_if_alone(mesh):
    network = encoder(normalize_audio=True)
    source = extract.layer_source(network, {"step": 1}, layer=1, mesh=mesh)
    found, _ = streamed(source, mesh, batch_seconds=5.0)
    wave_S = Waves().waves[6]
    wave_S = (wave_S - wave_S.mean()) / np.sqrt(wave_S.var() + 1e-5)
    alone_BTD = jax.jit(lambda wave_BS: network.features(wave_BS, layer=1))(wave_S[None])
    np.testing.assert_allclose(found[6], alone_BTD[0], atol=1e-4)
    assert found[1].shape == (0, 8) and found[4].shape == (3, 8)
    other, _ = streamed(source._replace(normalize=False), mesh, batch_seconds=5.0)
    assert np.abs(found[0] - other[0]).max() > 1e-6  # base's norm undoes most of a gain, not all


def test_the_programs_of_all_lengths_are_made_before_the_first_batch(mesh, monkeypatch):
    """Once each, and they are those that run: with the sharding and the types of a batch."""
    waves, rungs_R = Waves(np.tile(LENGTHS, 4)), np.array([2_000, 6_400, 9_000])
    found: list[dict[int, np.ndarray]] = []
    for at_once in (False, True):
        monkeypatch.setattr(stopping, "compiles_at_once", lambda at_once=at_once: at_once)
        source = extract.layer_source(encoder(), {"step": 1}, layer=1, mesh=mesh)
        extractor = extract.Extractor(
            source, waves.num_samples, batch_seconds=0.1, mesh=mesh, rungs_R=rungs_R
        )
        jax.clear_caches()
        made: list[int] = []  # programs, when a batch is computed
        with compilations() as compiled:

            def note(features_BTD, compiled=compiled, made=made):
                made.append(compiled.count("jit(_layer)"))
                return features_BTD

            for _ in range(2):
                found.append(dict(extractor.stream(waves, np.arange(len(waves.ids)), note)))
        assert set(made[: len(made) // 2]) == ({3} if at_once else {1, 2, 3}), made
        assert set(made[len(made) // 2 :]) == {3}
    for position, features_TD in found[0].items():
        for other in found[1:]:
            np.testing.assert_array_equal(features_TD, other[position])


def test_only_what_was_asked_for_and_finished_on_the_device(mfcc_source, mesh):
    positions = np.array([7, 2, 1])
    loudest = jax.jit(lambda features_BTD: features_BTD[..., 0].astype("float16"))
    found, _ = streamed(mfcc_source, mesh, batch_seconds=1.0, positions=positions, finish=loudest)
    whole, _ = streamed(mfcc_source, mesh, batch_seconds=1.0, positions=positions)
    for position in positions.tolist():
        assert found[position].dtype == np.float16
        np.testing.assert_array_equal(found[position], whole[position][:, 0].astype(np.float16))


def test_audio_of_another_length_than_the_corpus_says_is_refused(mfcc_source, mesh):
    waves = Waves()
    waves.waves[3] = waves.waves[3][:-1]
    with pytest.raises(ValueError, match=r"'u3' has 8999 samples, the corpus says 9000"):
        streamed(mfcc_source, mesh, batch_seconds=1.0, waves=waves)


def test_facts_of_a_checkpoint_change_with_its_weights():
    network = encoder()
    facts = extract.checkpoint_facts(network, {"step": 7})
    assert facts == extract.checkpoint_facts(encoder(), {"step": 7})
    other = jax.tree.map(lambda x: x * np.float32(1.001), network)
    assert facts["encoder"] != extract.checkpoint_facts(other, {"step": 7})["encoder"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "fbank"}, "features.kind is 'fbank'; give mfcc or layer"),
        ({"dtype": "float64"}, "features.dtype is 'float64'; give float16 or float32"),
        ({"sample_share": 0.0}, "features.sample_share is 0.0"),
        ({"batch_seconds": 0.0}, "features.batch_seconds is 0.0"),
        ({"kind": "layer"}, "features.checkpoint is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**({"kind": "mfcc"} | fields))


def test_a_layer_that_the_model_has_not_is_refused(mesh):
    with pytest.raises(ValueError, match="layer 3 was asked for, the model has 0 to 1"):
        extract.layer_source(encoder(), {}, layer=3, mesh=mesh)
