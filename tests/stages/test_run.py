# SPDX-License-Identifier: Apache-2.0
"""`hubert run` walks the arrows in order, stops where one fails, and ends with the table."""

import sys
import types

import pytest
from etils import epath
from ml_collections import ConfigDict

from hubert_jax.data import cards
from hubert_jax.stages import run

ITERATIONS = ("it1", "it2", "units")


def get_config(iteration: str) -> ConfigDict:
    iteration = iteration or "it1"
    before = {"it1": "", "it2": "it1", "units": "it2"}[iteration]
    features = dict(kind="layer" if before else "mfcc", checkpoint=before, layer=6)
    num_steps = 0 if iteration == "units" else 10
    return ConfigDict(
        dict(
            iteration=iteration,
            iterations=ITERATIONS,
            features=features,
            train=dict(num_steps=num_steps),
        )
    )


@pytest.fixture
def walked(monkeypatch):
    """Stages that write down that they ran; `failing` names the one that does not."""
    calls: list[str] = []
    failing: list[str] = []

    def stage(name):
        def stand_in(config, workdir):
            here = f"{config.iteration} {name}"
            if here in failing:
                raise ValueError(f"{here} is broken")
            calls.append(here)

        return types.SimpleNamespace(run=stand_in)

    for name in ("prepare", "features", "cluster", "label", "pretrain"):
        monkeypatch.setitem(sys.modules, f"hubert_jax.stages.{name}", stage(name))
    return types.SimpleNamespace(calls=calls, failing=failing)


def write_scores(workdir, iteration: str, split: str, pnmi: float) -> None:
    folder = epath.Path(workdir) / iteration / "labels" / split
    folder.mkdir(parents=True)
    scores = dict(pnmi=pnmi, phone_purity=0.5, cluster_purity=0.25, num_frames=1234)
    cards.write(folder / "card.json", {"num_codes": 100, "scores": scores})


def test_every_arrow_of_every_iteration_in_order(walked, tmp_path, capsys):
    run.run(get_config, epath.Path(tmp_path))
    arrows = ["features", "cluster", "label", "pretrain"]
    expected = ["it1 prepare"] + [f"{it} {arrow}" for it in ITERATIONS for arrow in arrows]
    assert walked.calls == expected[:-1]  # units does not train
    out = capsys.readouterr().out
    assert "[it2 3/4] label" in out and "[units 3/3] label" in out
    assert f"hubert export units --checkpoint={tmp_path}/it2/checkpoints --codebook=" in out
    assert "no scores" in out


def test_first_failure_stops_the_walk(walked, tmp_path, capsys):
    walked.failing.append("it2 cluster")
    with pytest.raises(ValueError, match="it2 cluster is broken"):
        run.run(get_config, epath.Path(tmp_path))
    assert walked.calls[-1] == "it2 features"
    assert capsys.readouterr().out.rstrip().endswith("[it2 2/4] cluster")


def test_configs_are_built_before_anything_runs(walked, tmp_path):
    def broken(iteration):
        if iteration == "units":
            raise ValueError("no such layer")
        return get_config(iteration)

    with pytest.raises(ValueError, match="no such layer"):
        run.run(broken, epath.Path(tmp_path))
    assert walked.calls == []


@pytest.mark.parametrize("test_scores", [False, True])
def test_table_has_a_row_per_kind_of_feature(walked, tmp_path, capsys, test_scores):
    for number, iteration in enumerate(ITERATIONS):
        write_scores(tmp_path, iteration, "validation", 0.3 + number / 100)
        if test_scores:
            write_scores(tmp_path, iteration, "test", 0.6 + number / 100)
    run.run(get_config, epath.Path(tmp_path))
    *_, title, header, mfcc, it1, it2 = capsys.readouterr().out.splitlines()
    assert ("'test'" if test_scores else "'validation'") in title
    assert header.split() == ["PNMI", "phone", "purity", "cluster", "purity", "K", "frames"]
    first = 0.6 if test_scores else 0.3
    for row, name, pnmi in [(mfcc, "MFCC", 0), (it1, "it1", 0.01), (it2, "it2", 0.02)]:
        assert row.split() == [name, f"{first + pnmi:.3f}", "0.500", "0.250", "100", "1234"]
    assert len({len(line) for line in (header, mfcc, it1, it2)}) == 1
