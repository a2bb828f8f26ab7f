# SPDX-License-Identifier: Apache-2.0
"""hubert cluster: features in, a codebook with its card out; what does not fit is refused."""

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from hubert_jax.data import arrays, cards, codebooks
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


class Killed(Exception):
    pass


def interrupted(monkeypatch, workdir, *, after: int, **changes) -> None:
    """k-means until its state was kept `after` times."""
    keep, kept = codebooks.keep_unfinished, []

    def keep_and_fall(*args, **options):
        keep(*args, **options)
        kept.append(1)
        if len(kept) == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(codebooks, "keep_unfinished", keep_and_fall)
        patch.setattr(cluster, "KEEP_SECONDS", 0.0)
        with pytest.raises(Killed):
            cluster.run(config(**changes), workdir)


def test_an_interrupted_fit_goes_on_to_the_same_file(workdir, monkeypatch, capsys):
    path = workdir / "it2" / "codebook.npz"
    cluster.run(config(), workdir)
    wanted = path.read_bytes(), path.with_suffix(".json").read_text()
    for after, where in (
        (1, "0 mini-batches and 0"),
        (3, "2 mini-batches"),
        (10, "6 mini-batches and 1"),
    ):
        path.unlink()
        path.with_suffix(".json").unlink()
        interrupted(monkeypatch, workdir, after=after)
        capsys.readouterr()
        cluster.run(config(), workdir)
        assert f"k-means goes on after {where}" in capsys.readouterr().out
        assert (path.read_bytes(), path.with_suffix(".json").read_text()) == wanted
        assert not (workdir / "it2" / codebooks.UNFINISHED).exists()


def test_what_cannot_be_gone_on_with_is_begun_anew(workdir, monkeypatch, capsys):
    path, unfinished = workdir / "it2" / "codebook.npz", workdir / "it2" / codebooks.UNFINISHED
    cluster.run(config(), workdir)
    wanted = path.read_bytes()

    def again() -> str:
        capsys.readouterr()
        cluster.run(config(), workdir)
        assert path.read_bytes() == wanted and not unfinished.exists()
        path.with_suffix(".json").unlink()
        return capsys.readouterr().out

    path.with_suffix(".json").unlink()
    interrupted(monkeypatch, workdir, after=2, num_codes=7)
    assert "kmeans.num_codes was 7, this run has 6; k-means begins anew" in again()
    interrupted(monkeypatch, workdir, after=2)
    content = bytearray(unfinished.read_bytes())
    content[len(content) // 2] ^= 1
    unfinished.write_bytes(content)
    said = again()
    assert "codebook.unfinished.npz: damaged; k-means begins anew" in said and "remove" not in said
    for name, other in (
        ("centers_CD", np.zeros((6, 4), np.float32)), ("random", np.array("{}")),
        ("pending", np.zeros((2, 3))), ("sums_inertia", np.float32(0)),
    ):  # fmt: skip
        interrupted(monkeypatch, workdir, after=3)
        with np.load(unfinished) as kept:
            arrays_ = dict(kept)
        np.savez(unfinished, **arrays_ | {name: other})
        assert "k-means begins anew" in again(), name
    with monkeypatch.context() as patch:
        patch.setattr(cards, "versions", lambda: {"hubert_jax": "0.2.0"})
        interrupted(monkeypatch, workdir, after=2)
    assert "versions.hubert_jax was '0.2.0', this run has" in again()


def test_a_kill_right_after_the_card_leaves_nothing(workdir, monkeypatch):
    unfinished = workdir / "it2" / codebooks.UNFINISHED
    interrupted(monkeypatch, workdir, after=2)
    kept = unfinished.read_bytes()
    cluster.run(config(), workdir)
    unfinished.write_bytes(kept)
    (workdir / "it2" / f".unfinished-{unfinished.name}").write_bytes(kept[:100])
    cluster.run(config(), workdir)
    assert not list((workdir / "it2").glob("*unfinished*"))


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
