# SPDX-License-Identifier: Apache-2.0
"""hubert features: what is stored, that a second run does nothing, and what is refused."""

import functools

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from hubert_jax import extract
from hubert_jax.data import arrays, cards
from hubert_jax.ops import mfcc
from hubert_jax.stages import features


def config(**fields) -> ConfigDict:
    section = dict(kind="mfcc", checkpoint="", layer=0, sample_share=0.6, dtype="float16",
                   batch_seconds=4.0, num_shards=3, dump=False)  # fmt: skip
    return ConfigDict(dict(seed=0, iteration="it1", features=section | fields))


@pytest.fixture
def workdir(tmp_path, memory_corpus, monkeypatch) -> epath.Path:
    monkeypatch.setattr(extract, "MIN_SHARD_SECONDS", 0.1)  # so that there are several shards
    return epath.Path(tmp_path)


def test_a_sample_of_the_training_utterances_is_stored(workdir, memory_corpus, capsys):
    features.run(config(), workdir)
    store = arrays.Store(workdir / "it1" / "features")
    train = memory_corpus.split("train")
    chosen = features.sample(train.ids, share=0.6, seed=0)
    assert store.ids == [train.ids[position] for position in chosen] and len(chosen) == 3
    for position in chosen:
        audio_S = train.audio(position)
        want_TD = np.asarray(jax.jit(mfcc.mfcc39)(audio_S)) if len(audio_S) >= 400 else []
        got_TD = store[train.ids[position]]
        assert got_TD.dtype == np.float16 and got_TD.shape == (len(want_TD), 39)
        np.testing.assert_allclose(got_TD, want_TD, rtol=1e-3, atol=1e-3)  # of float16
    assert store.card["rate"] == 100 and store.card["source"] == {"kind": "mfcc"}
    assert store.card["corpus"] == "sha256:corpus" and store.num_shards == 3
    assert "of the work was padding" in capsys.readouterr().out


def test_done_is_done_and_other_settings_are_refused(workdir, memory_corpus):
    features.run(config(), workdir)
    memory_corpus.split("train").reads.clear()
    features.run(config(batch_seconds=9.0), workdir)  # decides how, not what
    assert memory_corpus.split("train").reads == []
    with pytest.raises(ValueError, match=r"made_from\.dtype is 'float16', this run has 'float32'"):
        features.run(config(dtype="float32"), workdir)
    memory_corpus.card["fingerprint"] = "sha256:other"
    with pytest.raises(ValueError, match=r"made_from\.corpus is 'sha256:corpus'.*sha256:other"):
        features.run(config(), workdir)


def test_interrupted_run_goes_on_after_its_whole_shards(workdir, memory_corpus, monkeypatch):
    train = memory_corpus.split("train")
    whole = train.audio

    def fails_at_the_end(position):
        if position == len(train.ids) - 1:
            raise OSError("the disk was pulled out")
        return whole(position)

    monkeypatch.setattr(train, "audio", fails_at_the_end)
    with pytest.raises(OSError, match="pulled out"):
        features.run(config(sample_share=1.0), workdir)
    folder = workdir / "it1" / "features"
    num_whole = len(list(folder.glob("shard-*.npy")))
    assert num_whole == 2 and not (folder / "card.json").exists()
    monkeypatch.setattr(train, "audio", whole)
    train.reads.clear()
    features.run(config(sample_share=1.0), workdir)
    assert 0 < len(train.reads) < len(train.ids)
    assert arrays.Store(folder).ids == train.ids


def test_dump_stores_every_utterance_of_every_split(workdir, memory_corpus):
    features.run(config(dump=True), workdir)
    for name in memory_corpus.splits:
        store = arrays.Store(workdir / "it1" / "features" / name)
        split = memory_corpus.split(name)
        assert store.ids == split.ids and store.card["made_from"]["split"] == name
        np.testing.assert_array_equal(store.lengths, ((split.num_samples - 400) // 160 + 1).clip(0))
    sample = arrays.Store(workdir / "it1" / "features")
    dump = arrays.Store(workdir / "it1" / "features" / "train")
    for id_ in sample.ids:
        np.testing.assert_allclose(sample[id_], dump[id_], rtol=2e-3, atol=1e-3)


def test_features_too_large_for_float16_are_an_error_not_an_infinity(workdir, monkeypatch):
    compute = functools.partial(jax.jit(lambda audio_BS, n_B: 1e6 + mfcc.mfcc39(audio_BS)))
    loud = extract.Source({}, 160, 39, False, compute)
    monkeypatch.setattr(extract, "load_source", lambda *arguments: loud)
    with pytest.raises(ValueError, match=r"not finite in float16.*store float32"):
        features.run(config(), workdir)


def test_the_sample_depends_on_seed_and_id_alone():
    ids = [f"speaker{number % 7}/{number}" for number in range(1_000)]
    chosen = {ids[position] for position in features.sample(ids, share=0.1, seed=0)}
    assert len(chosen) == 100
    shuffled = list(np.random.default_rng(0).permutation(ids))
    positions = features.sample(shuffled, share=0.1, seed=0)
    assert {shuffled[position] for position in positions} == chosen
    assert positions.tolist() == sorted(positions)
    other = {ids[position] for position in features.sample(ids, share=0.1, seed=1)}
    assert len(chosen & other) < 50
    assert chosen <= {ids[position] for position in features.sample(ids, share=0.5, seed=0)}
    assert len(features.sample(ids[:3], share=0.01, seed=0)) == 1
    assert cards.normal({"positions": positions})["positions"] == positions.tolist()
