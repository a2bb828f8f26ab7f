# SPDX-License-Identifier: Apache-2.0
"""hubert cluster: features in, a codebook with its card out; what does not fit is refused."""

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from hubert_jax.data import arrays, cards
from hubert_jax.stages import cluster

KMEANS = dict(num_codes=6, seed_rows=200, num_restarts=2, seed_passes=2, batch_rows=128,
              max_passes=2, patience=10, lloyd_passes=2, lloyd_tolerance=1e-4)  # fmt: skip
SOURCE = {"kind": "layer", "layer": 2, "checkpoint": {"step": 3, "encoder": "sha256:e"}}


def config(features=(), **changes) -> ConfigDict:
    section = dict(kind="layer", checkpoint="it1", layer=2, sample_share=0.5, dtype="float16")
    section |= dict(features)
    return ConfigDict(dict(seed=0, iteration="it2", features=section, kmeans=KMEANS | changes))


@pytest.fixture
def workdir(tmp_path) -> epath.Path:
    write_features(epath.Path(tmp_path), seed=0)
    return epath.Path(tmp_path)


def write_features(workdir: epath.Path, *, seed: int, lengths=(100, 0, 150, 90)) -> np.ndarray:
    features_ND = np.random.default_rng(seed).standard_normal((sum(lengths), 5))
    features_ND = features_ND.astype(np.float16)
    parts = np.split(features_ND, np.cumsum(lengths)[:-1])
    made_from = {"source": SOURCE, "sample_share": 0.5, "seed": 0, "dtype": "float16"}
    arrays.write_store(
        workdir / "it2" / "features",
        ids=[f"u{number}" for number in range(len(lengths))],
        lengths=np.array(lengths),
        width=5,
        dtype="float16",
        num_shards=2,
        produce=lambda positions: [(position, parts[position]) for position in positions],
        card=cards.new("features", made_from=made_from, corpus="sha256:c", source=SOURCE, rate=50),
    )
    return features_ND


def test_codebook_and_card_are_written_and_a_second_run_does_nothing(workdir, capsys):
    cluster.run(config(), workdir)
    printed = capsys.readouterr().out
    path = workdir / "it2" / "codebook.npz"
    with np.load(path) as codebook:
        assert codebook["centers_CD"].shape == (6, 5)
        assert codebook["centers_CD"].dtype == np.float32
        counts_C, inertia = codebook["counts"], float(codebook["inertia"])
    assert counts_C.sum() == 340 and (counts_C > 0).all()
    card = cards.read(path.with_suffix(".json"))
    cards.require(path, card, kind="codebook", source=SOURCE, num_codes=6, rate=50, width=5)
    assert card["digest"] == cards.digest(path) and card["corpus"] == "sha256:c"
    assert card["inertia"] == inertia and card["used_codes"] == 6 and 1 < card["perplexity"] <= 6
    assert f"inertia {inertia:.5g} per frame over 340 frames, 6 of 6 codes used" in printed

    cluster.run(config(), workdir)
    assert "done before" in capsys.readouterr().out
    assert cards.digest(path) == card["digest"]


def test_same_features_and_seed_give_the_same_file(workdir):
    path = workdir / "it2" / "codebook.npz"
    digests = []
    for _ in range(2):
        cluster.run(config(), workdir)
        with np.load(path) as codebook:
            digests.append(codebook["centers_CD"].tobytes())
        path.with_suffix(".json").unlink()
    assert digests[0] == digests[1]


def test_a_codebook_made_otherwise_is_refused(workdir):
    cluster.run(config(), workdir)
    with pytest.raises(ValueError, match=r"made_from\.kmeans\.num_codes is 6, this run has 7"):
        cluster.run(config(num_codes=7), workdir)
    (workdir / "it2" / "features").rmtree()
    write_features(workdir, seed=1)
    with pytest.raises(ValueError, match=r"made_from\.features\.shards\..*remove .*codebook\.\*"):
        cluster.run(config(), workdir)


def test_features_of_another_config_are_refused(workdir):
    for field, value, name in (
        ("layer", 1, r"source\.layer is 2, expected 1"),
        ("kind", "mfcc", r"source\.kind is 'layer', expected 'mfcc'"),
        ("sample_share", 0.1, r"made_from\.sample_share is 0\.5, expected 0\.1"),
    ):
        with pytest.raises(ValueError, match=name):
            cluster.run(config({field: value}), workdir)
    with pytest.raises(FileNotFoundError, match=r"it9/features/card\.json: no card"):
        other = config()
        other.iteration = "it9"
        cluster.run(other, workdir)


def test_more_codes_than_frames_are_refused_and_nothing_is_written(workdir):
    with pytest.raises(ValueError, match=r"341 codes for 340 frames"):
        cluster.run(config(num_codes=341, seed_rows=400), workdir)
    assert not list((workdir / "it2").glob("*codebook*"))
