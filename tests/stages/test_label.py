# SPDX-License-Identifier: Apache-2.0
"""hubert label: every frame gets its nearest centre, the card its scores, misfits an error."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from hubert_jax.data import arrays, batches, cards
from hubert_jax.ops import mfcc, scores
from hubert_jax.stages import label

NUM_CODES = 12


def config(**fields) -> ConfigDict:
    section = dict(kind="mfcc", checkpoint="", layer=0, sample_share=1.0, dtype="float32",
                   batch_seconds=4.0, num_shards=3, dump=False)  # fmt: skip
    sections = dict(features=section, kmeans=dict(num_codes=NUM_CODES), labels=dict(num_shards=2))
    return ConfigDict(dict(seed=0, iteration="it1") | sections | fields)


@pytest.fixture
def workdir(tmp_path, memory_corpus) -> epath.Path:
    workdir = epath.Path(tmp_path)
    write_codebook(workdir, memory_corpus, seed=0)
    return workdir


def mfcc_of(corpus, split: str, position: int) -> np.ndarray:
    audio_S = corpus.split(split).audio(position)
    return np.asarray(jax.jit(mfcc.mfcc39)(audio_S), np.float64)


def write_codebook(workdir, corpus, *, seed, num_codes=NUM_CODES, source=None) -> np.ndarray:
    features_TD = mfcc_of(corpus, "train", 1)
    chosen = np.random.default_rng(seed).choice(len(features_TD), num_codes, replace=False)
    centers_CD = features_TD[chosen].astype(np.float32)
    (workdir / "it1").mkdir(exist_ok=True)
    np.savez(workdir / "it1" / "codebook.npz", centers_CD=centers_CD)
    source = source or {"kind": "mfcc"}
    digest = cards.digest(workdir / "it1" / "codebook.npz")
    card = cards.new("codebook", made_from={}, source=source, num_codes=num_codes, digest=digest)
    cards.write(workdir / "it1" / "codebook.json", card)
    return centers_CD


def test_every_frame_of_every_split_gets_its_nearest_centre(workdir, memory_corpus):
    label.run(config(), workdir)
    centers_CD = np.load(workdir / "it1" / "codebook.npz")["centers_CD"].astype(np.float64)
    codebook = cards.digest(workdir / "it1" / "codebook.npz")
    for name in memory_corpus.splits:
        store = arrays.Store(workdir / "it1" / "labels" / name)
        split = memory_corpus.split(name)
        assert store.ids == split.ids and store.dtype == np.int16 and store.width is None
        card = store.card
        assert (card["kind"], card["rate"], card["num_codes"]) == ("labels", 100, NUM_CODES)
        assert (card["corpus"], card["codebook"]) == ("sha256:corpus", codebook)
        for position, id_ in enumerate(split.ids):
            if split.num_samples[position] < 400:
                assert store[id_].shape == (0,)
                continue
            features_TD = mfcc_of(memory_corpus, name, position)
            distances_TC = ((features_TD[:, None] - centers_CD) ** 2).sum(axis=-1)
            chosen_T = np.take_along_axis(distances_TC, store[id_][:, None].astype(int), 1)[:, 0]
            np.testing.assert_allclose(chosen_T, distances_TC.min(axis=1), rtol=1e-4, atol=0.05)
        batches.check_labels(split, store)  # what training asks of them
    assert (workdir / "it1" / "codebook.npz").exists()


def test_scores_are_in_the_card_and_printed_where_there_are_phones(workdir, memory_corpus, capsys):
    label.run(config(), workdir)
    printed = capsys.readouterr().out
    for name in ("train", "validation"):
        store = arrays.Store(workdir / "it1" / "labels" / name)
        split = memory_corpus.split(name)
        phones, codes = [], []
        for position, id_ in enumerate(split.ids):
            intervals = split.phones(position)
            for t, code in enumerate(store[id_]):
                inside = np.searchsorted(intervals.starts, t * 160 + 200, side="right") - 1
                phones.append("a s sil".split().index(intervals.names[inside]))
                codes.append(int(code))
        counts_PC = np.zeros((3, NUM_CODES))
        np.add.at(counts_PC, (phones, codes), 1)
        want = scores.score(counts_PC)
        found = store.card["scores"]
        assert found == pytest.approx(want._asdict())
        assert found["num_frames"] == store.num_rows and 0.3 < found["pnmi"] <= 1
        assert f"PNMI {found['pnmi']:.3f}, phone purity {found['phone_purity']:.3f}" in printed
        used = set(np.concatenate([store[id_] for id_ in store.ids]).tolist())
        assert store.card["used_codes"] == len(used)
        assert 1 < store.card["perplexity"] <= len(used)
    assert cards.read(workdir / "it1" / "labels" / "test" / "card.json")["scores"] is None
    assert "labels test" in printed and "no phone times" in printed


def test_done_is_done_and_another_codebook_or_corpus_is_refused(workdir, memory_corpus):
    label.run(config(), workdir)
    memory_corpus.split("train").reads.clear()
    label.run(config(), workdir)
    assert memory_corpus.split("train").reads == []
    write_codebook(workdir, memory_corpus, seed=1)
    with pytest.raises(ValueError, match=r"labels/train/card\.json: made_from\.codebook is 'sha"):
        label.run(config(), workdir)
    write_codebook(workdir, memory_corpus, seed=0)
    label.run(config(), workdir)
    memory_corpus.card["fingerprint"] = "sha256:other"
    with pytest.raises(ValueError, match=r"made_from\.corpus is 'sha256:corpus'.*sha256:other"):
        label.run(config(), workdir)


def test_codebooks_that_do_not_fit_are_refused_by_field(workdir, memory_corpus):
    with pytest.raises(ValueError, match=r"codebook\.json: num_codes is 12, expected 500"):
        label.run(config(kmeans=dict(num_codes=500)), workdir)
    layer_6 = {"kind": "layer", "layer": 6, "checkpoint": {"step": 1, "encoder": "sha256:x"}}
    write_codebook(workdir, memory_corpus, seed=0, source=layer_6)
    with pytest.raises(ValueError, match=r"codebook\.json: source\.checkpoint is .*'\(absent\)'"):
        label.run(config(), workdir)
    np.savez(workdir / "it1" / "codebook.npz", centers_CD=np.zeros((NUM_CODES, 13), np.float32))
    digest = cards.digest(workdir / "it1" / "codebook.npz")
    source = {"kind": "mfcc"}
    write_card = cards.new(
        "codebook", made_from={}, source=source, num_codes=NUM_CODES, digest=digest
    )
    cards.write(workdir / "it1" / "codebook.json", write_card)
    with pytest.raises(ValueError, match=r"centres of shape \(12, 13\), expected \(12, 39\)"):
        label.run(config(), workdir)
    (workdir / "it1" / "codebook.npz").unlink()
    with pytest.raises(FileNotFoundError, match="run hubert cluster first"):
        label.run(config(), workdir)
    assert not (workdir / "it1" / "labels").exists()
