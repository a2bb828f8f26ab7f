# SPDX-License-Identifier: Apache-2.0
"""The bench: who is timed when, how many operations there are, what the table says."""

import dataclasses
import json

import jax
import pytest
from etils import epath

from hubert_jax import config_files
from hubert_jax.bench import counts, memory, minimal, ours, peers, pipeline, timing
from hubert_jax.data import batches
from hubert_jax.data.corpus import Corpus
from hubert_jax.model import HubertConfig
from hubert_jax.optim import OptimConfig
from hubert_jax.stages import bench, pretrain
from tests import tiny

OPTIMIZER = OptimConfig(**config_files.load("configs/demo.py").optim)


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


def test_contenders_take_turns(monkeypatch):
    """A short work several times in its turn, of which the first is not counted."""
    calls: list[str] = []
    now = 0.0

    def contender(name, seconds):
        def work():
            nonlocal now
            first_of_turn = not calls or calls[-1] != name
            now += seconds + (0.125 if first_of_turn else 0.0)
            calls.append(name)

        return timing.Contender(name, lambda: work)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    timings = timing.alternate("work", [contender("a", 0.0625), contender("b", 2.0)], rounds=3)
    assert "".join(calls) == "aabb" + 3 * "aaaaab"
    assert [t.name for t in timings] == ["a", "b"]
    assert [t.seconds for t in timings] == [3 * [0.0625], 3 * [2.125]]


def test_the_median_is_not_the_mean():
    assert timing.Timing("a", [1.0, 2.0, 30.0], 0.0, "").median == 2.0


def test_the_command_times_ours_alone_where_nobody_is_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers, "installed", lambda *packages: False)
    path = tmp_path / "bench.json"
    bench.main(["mfcc", "mfcc", "--config=configs/demo.py", "--rounds=1", f"--out={path}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = json.loads(path.read_text())["rows"]
    assert [row["who"] for row in rows] == ["hubert_jax"] * 2
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert rows[0]["ratio"] is None and rows[0]["seconds"] > 0


def test_unknown_work_is_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["trainign"])
    assert "Did you mean 'training'?" in capsys.readouterr().err


def test_only_names_one_who_is_there():
    with pytest.raises(ValueError, match="there are hubert_jax"):
        bench.main(["mfcc", "--config=configs/demo.py", "--only=nobody"])


def test_the_parts_begin_with_the_whole_step():
    """Timings are compared with the first, and every part is timed both ways."""
    wave_BS, labels_BT = ours.audio(1, 0.5, 10)
    parts = list(ours.parts(tiny.BASE, tiny.HEAD, OPTIMIZER, wave_BS, labels_BT))
    names = [part.name for part in parts]
    assert names[0] == "whole step" and names[-1] == "clipping and AdamW"
    forward = {name.removesuffix(", forward") for name in names if name.endswith(", forward")}
    both = {name.removesuffix(", forward + backward") for name in names if "backward" in name}
    assert forward == both and len(names) == 2 + 2 * len(forward) == 12


def test_the_optimiser_part_moves_the_parameters_again_and_again():
    hubert = jax.jit(tiny.model)()
    work = ours._update(OPTIMIZER, hubert)
    work(), work()  # the second call has what the first one donated
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(hubert))


@pytest.mark.parametrize(
    ("limit", "rows"),
    [(1000, 90), (150, 5), (90, 1), (10**9, 128)],  # 100 whatever the rows, 10 each
)
def test_the_largest_batch_is_extrapolated_from_a_probe(monkeypatch, limit, rows):
    taken = []
    monkeypatch.setattr(memory, "peak", lambda: 100 + 10 * taken[-1])

    def contender(num_rows):
        return timing.Contender("a", lambda: lambda: taken.append(num_rows))

    assert memory.largest(contender, fixed=100, limit=limit, probe=4, most=128) == rows
    assert taken == [4, 4]


def test_the_memory_of_the_state_is_four_float32_per_parameter():
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tiny.model)))
    assert memory.state_bytes(tiny.BASE, tiny.HEAD, 12) == 4 * size


def test_more_rungs_crop_less_of_librispeech():
    config = batches.BatchConfig(**config_files.load("configs/base.py").batch)
    one = dataclasses.replace(config, num_rungs=1)
    assert 0 < pipeline.share_left_out(config) < 0.5 * pipeline.share_left_out(one) < 0.5


def test_a_made_work_folder_is_one_that_training_takes(tmp_path):
    workdir = epath.Path(tmp_path)
    split, store = pipeline.make_work(
        workdir, utterances={"train": 8, "validation": 2}, num_codes=9
    )
    corpus = Corpus(workdir / "corpus")
    labels = pretrain.open_labels(workdir, (str(workdir / pipeline.LABELS),), corpus)
    assert labels["train"][0].ids == split.ids == store.ids
    size = sum(path.stat().st_size for path in (tmp_path / "corpus").glob("*train.array_record*"))
    assert 0.9 < size / split.num_samples.sum() < 1.4  # LibriSpeech: 1.13 bytes a sample
    config = batches.BatchConfig(**config_files.load("configs/base.py").batch)
    (rate,) = pipeline.rates(
        split, [store], config, seconds=32, num_threads=1, rounds=1, normalize=True
    )
    assert rate.audio_seconds > 32 and rate.seconds > 0


@pytest.mark.parametrize(("name", "size"), [("base", "base"), ("large", "large"), ("demo", None)])
def test_minimal_hubert_has_the_published_sizes_alone(name, size):
    config = HubertConfig(**config_files.load(f"configs/{name}.py").model)
    assert minimal.size_of(config) == size
