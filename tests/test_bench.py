# SPDX-License-Identifier: Apache-2.0
"""The bench: who is timed when, how many operations there are, what the table says."""

import json

import pytest

from hubert_jax import config_files
from hubert_jax.bench import counts, peers, timing
from hubert_jax.model import HubertConfig
from hubert_jax.stages import bench


@pytest.mark.parametrize(
    ("name", "seconds", "forward", "training"),
    [("base", 10, 14.8, 44.4), ("base", 15.6, 15.3, 46.0), ("large", 15.6, 39.8, 119.3)],
)
def test_operations_are_those_counted_by_hand(name, seconds, forward, training):
    """Giga-operations per second of audio."""
    config = HubertConfig(**config_files.load(f"configs/{name}.py").model)
    num_samples = round(16_000 * seconds)
    assert counts.forward(config, num_samples) / seconds / 1e9 == pytest.approx(forward, abs=0.05)
    assert counts.training(config, num_samples) / seconds / 1e9 == pytest.approx(training, abs=0.05)
    half = counts.forward(config, num_samples, num_layers=config.num_layers // 2)
    assert half < counts.forward(config, num_samples) < 2 * half


def test_contenders_take_turns():
    calls: list[str] = []

    def contender(name):
        return timing.Contender(name, lambda: lambda: calls.append(name))

    timings = timing.alternate("work", [contender("a"), contender("b")], rounds=3)
    assert "".join(calls) == "aabb" + "ababab"
    assert [t.name for t in timings] == ["a", "b"] and all(len(t.seconds) == 3 for t in timings)


def test_the_median_is_not_the_mean():
    assert timing.Timing("a", [1.0, 2.0, 30.0], 0.0, "").median == 2.0


def test_the_command_times_ours_alone_where_nobody_is_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "installed", lambda *packages: False)
    path = tmp_path / "bench.json"
    bench.main(["mfcc", "start", "--config=configs/demo.py", "--rounds=1", f"--out={path}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = json.loads(path.read_text())["rows"]
    assert [row["who"] for row in rows] == ["hubert_jax", "hubert_jax"]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert rows[0]["ratio"] == 1.0 and rows[0]["seconds"] > 0


def test_unknown_work_is_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["trainign"])
    assert "Did you mean 'training'?" in capsys.readouterr().err
