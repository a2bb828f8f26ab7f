# SPDX-License-Identifier: Apache-2.0
"""What is counted by hand: it must add up, and grow and shrink as it should."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import soundfile
from etils import epath

from hubert_jax import config_files, heads
from hubert_jax.planning import advice, chips, estimate
from hubert_jax.stages import plan, prepare


def work(name="base", *flags, rows=64, num_samples=249_680, **mesh):
    config = config_files.load(f"configs/{name}.py", flags)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    return plan.work(config, sizes, plan.Rung(num_samples, rows, 1.0))


def test_parameters_are_those_of_the_model_and_fsdp_divides_them():
    alone = work()
    model = heads.abstract(alone.model, alone.head, alone.num_codes)
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert estimate.memory(alone).parameters == 4 * size
    assert estimate.memory(alone).optimizer == 8 * size
    split = estimate.memory(work(fsdp=8)).parameters
    assert size / 2 < split < 1.05 * size / 2


def test_what_is_held_falls_with_devices_parts_and_remat():
    def held(*flags, **mesh):
        return estimate.memory(work("base", *flags, **mesh)).activations

    assert held(data=8) == pytest.approx(held() / 8)
    assert held("--config.train.accumulate=4") == pytest.approx(held() / 4)
    by_remat = [held(f"--config.model.remat={kind}") for kind in ("none", "dots", "layer")]
    assert by_remat[0] > by_remat[1] > by_remat[2]


def test_collectives_do_not_grow_with_the_devices_beyond_a_ring():
    def total(**mesh):
        return sum(estimate.predicted(work(**mesh)).values())

    assert estimate.predicted(work()) == {}
    one_ring = estimate.memory(work()).parameters  # in bfloat16, there and back
    for ways in (2, 8, 64):
        assert total(data=ways) == pytest.approx(one_ring * (ways - 1) / ways)
    assert total(fsdp=8) < total(fsdp=64) < 1.2 * total(fsdp=8)


def test_time_is_between_all_at_once_and_one_after_the_other():
    one = estimate.estimate(work(data=16), chips.topology("v5e:4x4"))
    parts = (one.arithmetic_seconds, one.hbm_seconds, one.link_seconds)
    assert one.shortest == max(parts) and one.longest == parts[0] + parts[1] + parts[2]
    assert 0 < one.mfu(one.longest) < one.mfu(one.shortest) <= 1.0


def test_groups_across_nodes_use_the_network():
    nodes, node = chips.topology("h100:4x8"), chips.topology("h100:8")
    assert node.ring_bandwidth(8, inner=True) == 450e9
    assert nodes.ring_bandwidth(4, inner=False) == 50e9
    many = estimate.estimate(work(data=32), nodes).link_seconds
    assert many > 5 * estimate.estimate(work(data=8), node).link_seconds


def test_advice_fits_and_is_quicker_than_what_else_fits():
    topology = chips.topology("v5e:4x4")
    one = work("large", rows=64, data=16)
    found = advice.best(one, topology)
    assert estimate.fits(found.estimate.memory, topology)
    for other in advice.candidates(one, 16):
        counted = estimate.estimate(other, topology)
        if estimate.fits(counted.memory, topology):
            assert counted.longest > 0.98 * found.estimate.longest


def test_there_is_no_advice_where_nothing_fits():
    tiny_chip = dataclasses.replace(chips.CHIPS["v5e"], hbm=1e9)
    assert advice.best(work(data=4), chips.Topology(tiny_chip, (2, 2))) is None


@pytest.mark.parametrize("name", ["v7:2x2", "v5e", "v5e:0x2", "v5p:2x2", "h100:2x2x2"])
def test_an_unknown_topology_says_what_there_is(name):
    with pytest.raises(ValueError, match=f"--topology={name}"):
        chips.topology(name)


def test_the_command_estimates_for_gpus(capsys):
    plan.main(["--config=configs/large.py", "--topology=h100:4x8", "--seconds", "5", "15.6"])
    out = capsys.readouterr().out
    assert "an estimate: counted by hand" in out and "recommended" in out
    assert out.count("| estimate") == 2 and "400000 steps" in out


def test_every_rung_of_a_corpus_is_planned_for(tmp_path, capsys):
    for n in range(12):  # of three speakers; 1.1 s and 2.1 s
        path = tmp_path / "audio" / f"speaker{n % 3}" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_S = np.random.default_rng(n).normal(size=17_600 + 16_000 * (n % 2))
        soundfile.write(path, 0.1 * noise_S, 16_000)
    flags = [
        f"--config.{field}"
        for field in (
            f"corpus.train={tmp_path / 'audio'}", "corpus.num_workers=0", "corpus.num_shards=1",
            "corpus.validation_share=0.34", "batch.rungs=(1.0,2.0)", "batch.min_seconds=1.0",
            "batch.row_multiple=2",
        )
    ]  # fmt: skip
    prepare.run(config_files.load("configs/demo.py", flags), epath.Path(tmp_path / "work"))
    plan.main(
        ["--config=configs/demo.py", "--topology=h100:2", f"--workdir={tmp_path / 'work'}", *flags]
    )
    rows = re.findall(r"^\| (\S+) s +\| (\d+) .* estimate \|$", capsys.readouterr().out, re.M)
    # Whole frames; 8.1 s of audio are 8 and 4 such rows, shared by two devices.
    assert rows == [("0.98", "4"), ("1.99", "2")]


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"raise batch.seconds to 4000"):
        plan.main(["--config=configs/base.py", "--topology=h100:32x8", "--seconds", "15.625"])
