# SPDX-License-Identifier: Apache-2.0
"""The bench: who is timed when, how many operations there are, what the table says."""

import dataclasses
import importlib.metadata
import json
import platform
import re
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from hubert_jax import config_files
from hubert_jax.bench import (
    clustering,
    counts,
    machine,
    memory,
    minimal,
    ours,
    peers,
    pipeline,
    table,
    timing,
)
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


def test_with_one_warm_up_the_second_call_is_timed():
    calls: list[str] = []
    contenders = [
        timing.Contender(name, lambda name=name: lambda: (calls.append(name), time.sleep(0.2)))
        for name in "ab"
    ]
    timings = timing.alternate("work", contenders, rounds=2, warm_ups=1)
    assert "".join(calls) == "ab" + 2 * "ab" and [len(t.seconds) for t in timings] == [2, 2]


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


@pytest.mark.parametrize("tunables", [None, "glibc.malloc.hugetlb=1"])
def test_on_a_cpu_the_malloc_that_it_was_measured_with_is_named(tunables, monkeypatch, capsys):
    monkeypatch.setitem(bench.WORK, "mfcc", lambda config, args: [table.Row("work", "us", 1.0)])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    bench.main(["mfcc", "--config=configs/demo.py"])
    assert ("launch/local.sh bench" in capsys.readouterr().out) == (tunables is None)


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


def test_minimal_hubert_is_timed_with_a_word_on_what_it_is_not(monkeypatch):
    """And the others are not accused."""
    monkeypatch.setattr(peers, "installed", lambda *packages: True)
    config = HubertConfig(**config_files.load("configs/base.py").model)
    wave_BS, labels_BT = ours.audio(1, 0.5, 10)
    found = [
        *peers.training(config, 256, wave_BS, labels_BT, dtype="float32", compiled=True),
        *peers.extraction(config, wave_BS, layer=6, dtype="float32", compiled=True),
    ]
    accused = [contender.name for contender in found if "not faithful" in contender.note]
    assert accused == ["minimal_hubert", "minimal_hubert, torch.compile", "minimal_hubert"]


def test_compiled_peers_are_named_after_those_they_compile(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda *packages: "minimal_hubert" not in packages)
    names = {}
    for compiled in (False, True):
        contenders = peers.extraction(
            tiny.BASE, np.zeros((1, 8000), np.float32), layer=1, dtype="float32", compiled=compiled
        )
        names[compiled] = [contender.name for contender in contenders]
    assert names[False] == ["transformers, whole", "transformers, cut to 1 layers", "torchaudio"]
    both = [(name, f"{name}, torch.compile") for name in names[False]]
    assert names[True] == [name for pair in both for name in pair]


def test_everybody_makes_the_same_full_pass():
    """Means of the rows nearest to each centre; two shards are as good as one."""
    rng = np.random.default_rng(0)
    rows_ND = 3 + rng.standard_normal((4000, 5), np.float32)
    centers_CD = rows_ND[:7].copy()
    means: dict[str, list[np.ndarray]] = {}
    shards = [rows_ND[:1500], rows_ND[1500:]]
    contenders = clustering.full_passes(shards, centers_CD, means)
    for contender in contenders:
        contender.prepare()()
    codes_N = np.argmin(np.square(rows_ND[:, None] - centers_CD).sum(axis=2), axis=1)
    want_CD = np.stack([rows_ND[codes_N == code].mean(axis=0) for code in range(7)])
    assert set(means) == {contender.name for contender in contenders}
    for (got_CD,) in means.values():
        np.testing.assert_allclose(got_CD, want_CD, atol=1e-5)
    assert clustering.inertia(rows_ND, want_CD) < clustering.inertia(rows_ND, centers_CD)


def test_seedings_are_rows_drawn_anew_far_from_each_other():
    """One of each of six heaps, which as many rows drawn evenly hit once in 60 times."""
    rng = np.random.default_rng(0)
    heaps_CD = 100 * rng.standard_normal((6, 4), np.float32)
    rows_ND = np.repeat(heaps_CD, 50, axis=0) + rng.standard_normal((300, 4), np.float32)
    found: dict[str, list[np.ndarray]] = {}
    contenders = clustering.seedings(rows_ND, 6, found)
    for contender in contenders:
        work = contender.prepare()
        work(), work()
    assert set(found) == {contender.name for contender in contenders}
    for first_CD, second_CD in found.values():
        assert not np.array_equal(first_CD, second_CD)
        for centers_CD in (first_CD, second_CD):
            assert {tuple(row) for row in centers_CD} <= {tuple(row) for row in rows_ND}
            assert clustering.inertia(rows_ND, centers_CD) < 50


def test_kmeans_is_timed_whole_and_in_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "installed", lambda *packages: False)
    command = ["kmeans", "--config=configs/demo.py", "--rounds=1", "--frames=600"]
    bench.main([*command, "--codebooks=3x5", f"--out={tmp_path / 'all.json'}"])
    rows = table.read(epath.Path(tmp_path / "all.json"))
    assert [row.work for row in rows] == [
        "k-means, 600 x 3, K 5", "seeding, 600 x 3, K 5", "full pass, 600 x 3, K 5",
        "assignment, 600 x 3, K 5",
    ]  # fmt: skip
    fitted, seeded, passed = (float(re.findall(r"inertia (\S+\d)", x.note)[0]) for x in rows[:3])
    assert fitted <= passed < seeded
    assert rows[1].note.endswith(", mean of 3; 4 candidates a centre")


def test_only_picks_the_parts_of_kmeans_that_its_contender_has(monkeypatch, tmp_path):
    def seedings(rows_ND, num_codes, found):
        return [timing.Contender("peer", lambda: lambda: found.update(peer=[rows_ND[:5]]))]

    monkeypatch.setattr(peers, "installed", lambda *packages: False)
    monkeypatch.setattr(clustering, "seedings", seedings)
    command = ["kmeans", "--config=configs/demo.py", "--rounds=1", "--frames=600"]
    command += ["--codebooks=3x5", f"--out={tmp_path / 'one.json'}"]
    with pytest.raises(ValueError, match="--only=nobody: nobody is called that in kmeans"):
        bench.main([*command, "--only=nobody"])
    bench.main([*command, "--only=peer"])
    rows = table.read(epath.Path(tmp_path / "one.json"))
    assert [row.who for row in rows] == ["peer"] and rows[0].work.startswith("seeding")


def test_the_json_says_what_machine_and_which_versions(monkeypatch, tmp_path):
    versions = {"torch": "1.2+cpu", "minimal-hubert": "0.0.8", "jax": "0.9"}

    def version(package):
        if package in versions:
            return versions[package]
        raise importlib.metadata.PackageNotFoundError(package)

    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU: 2 GHz\nmodel name\t: another\n")
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 3 * 2**29)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in ("minimal_hubert", "sklearn", "faiss"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    path = epath.Path(tmp_path / "bench.json")
    table.write(path, [], {"rows": 2}, matmul_peaks={"bfloat16": 1e15})
    contents = json.loads(path.read_text())
    assert contents["versions"] == {
        **versions, "hubert_jax": "not installed", "numpy": "not installed",
        "python": platform.python_version(),
    }  # fmt: skip
    assert contents["cpu"] == "Some CPU: 2 GHz" and contents["memory_GiB"] == 1.5
    assert contents["matmul_peaks"] == {"bfloat16": 1e15}
    assert contents["environment"] == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert not {"minimal_hubert", "sklearn", "faiss"} & set(sys.modules)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "missing")
    assert machine.cpu() == platform.processor()


def test_the_json_has_the_peak_that_mfu_rests_on(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "installed", lambda *packages: False)
    monkeypatch.setattr(ours, "matmul_peak", {"float32": 1e12}.__getitem__)
    idle = timing.Contender(ours.NAME, lambda: lambda: time.sleep(0.1))
    monkeypatch.setattr(ours, "extraction", lambda *args, **kwargs: idle)
    path = tmp_path / "bench.json"
    command = ["--config=configs/demo.py", "--rounds=1", "--rows=1", "--seconds=0.5"]
    command += ["--config.model.compute_dtype=float32"]
    bench.main(["extraction", *command, f"--out={path}"])
    contents = json.loads(path.read_text())
    assert contents["matmul_peaks"] == {"float32": 1e12}
    for row in contents["rows"]:
        layer = int(row["work"].split()[1].rstrip(","))
        model = HubertConfig(**config_files.load("configs/demo.py").model)
        operations = counts.forward(model, 8000, num_layers=layer)
        assert row["mfu"] == pytest.approx(operations / row["seconds"] / 1e12 / jax.device_count())
