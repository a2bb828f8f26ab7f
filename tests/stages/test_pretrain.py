# SPDX-License-Identifier: Apache-2.0
"""Numbers that go wrong while the stage trains: skipped, named, and too many end the run."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from etils import epath

from hubert_jax import checkpoints, cli, logs, pretraining, stopping, train, watch
from hubert_jax.data import batches
from hubert_jax.data.corpus import Corpus, Split
from hubert_jax.stages import pretrain
from tests import tones
from tests.test_padding import compilations

TRAINING = ("batch.seconds=8.0", "train.report_every=1", "checkpoints.keep_last=9")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Of more utterances than a batch has rows."""
    folder = tmp_path_factory.mktemp("project")
    for n in range(3):
        tones.write(folder / "tones" / f"more{n}")
    return tones.make_project(folder, *TRAINING)


@pytest.fixture
def workdir(project, tmp_path) -> epath.Path:
    shutil.copytree(project / "work", tmp_path / "work")
    return epath.Path(tmp_path / "work")


def skipped(workdir) -> dict[float, float]:
    """By the last step of each report, the share of its steps, as metrics.jsonl has it."""
    lines = logs.read_metrics(workdir / "it1" / "logs" / "metrics.jsonl")
    return {line["step"]: line["train/skipped"] for line in lines if "train/skipped" in line}


def test_the_steps_that_meet_a_broken_utterance_are_skipped_with_their_ids(
    project, workdir, monkeypatch, capsys
):
    num_steps = 6
    config = tones.get_config(project, *TRAINING, f"train.num_steps={num_steps}")
    split = Corpus(workdir / "corpus").split("train")
    settings = batches.BatchConfig(**config.batch)
    plan = batches.Plan(split.num_samples, settings, seed=config.seed, row_multiple=8)
    planned = [[split.ids[n] for n in plan[step].utterances_B] for step in range(num_steps)]
    broken = planned[1][0]
    bad = {step: ids for step, ids in enumerate(planned, start=1) if broken in ids}
    assert 2 in bad and 1 <= len(bad) < num_steps

    audio = Split.audio

    def read(self, position, *args):
        samples_S = audio(self, position, *args)
        return samples_S * np.float32(np.nan) if self.ids[position] == broken else samples_S

    monkeypatch.setattr(Split, "audio", read)
    pretrain.run(config, workdir)
    out = capsys.readouterr().out
    said = re.findall(r"step (\d+): loss or gradient is not finite.* utterances: (.*)", out)
    assert said == [(str(step), ", ".join(ids)) for step, ids in bad.items()]
    found = skipped(workdir)  # of the last two steps together
    found |= {num_steps - 1: 2 * found[num_steps] - (num_steps in bad), num_steps: num_steps in bad}
    assert found == {step: step in bad for step in range(1, num_steps + 1)}
    trained, card = checkpoints.load_weights(workdir / "it1" / "checkpoints")
    assert card["step"] == num_steps
    assert all(np.isfinite(array).all() for array in trained.arrays.values())


def test_a_run_whose_steps_all_go_wrong_ends_and_names_its_last_checkpoint(
    project, workdir, monkeypatch, capsys
):
    num_good, loss = 3, pretraining.loss

    def failing(model, batch, key, step, **options):
        value = loss(model, batch, key, step, **options)
        return value._replace(total=value.total * jnp.where(step < num_good, 1.0, jnp.nan))

    monkeypatch.setattr(pretraining, "loss", failing)
    flags = tones.flags(project, *TRAINING, "train.num_steps=20", "checkpoints.every=3")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["pretrain", f"--config={tones.DEMO}:it1", f"--workdir={workdir}", *flags])
    assert exit_.value.code == 1
    last = num_good + watch.MAX_SKIPPED + 1
    said, folder = capsys.readouterr().err, workdir / "it1" / "checkpoints"
    assert f"hubert pretrain: error: 11 of the last 200 steps, up to step {last}," in said
    newest = re.findall(r"The newest checkpoint is good: (\S+)\. ", said)
    assert newest == [str(checkpoints.resolve(folder))] == [str(folder / "12")]
    assert skipped(workdir) == {step: step > num_good for step in range(1, last)}
    named, before = (checkpoints.load_weights(folder / step)[0].arrays for step in ("12", "3"))
    for name, array in named.items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, before[name])


def test_programs_for_all_lengths_that_are_compiled_at_once_are_those_that_run(
    tmp_path, monkeypatch
):
    """Each once, before the first step, and the losses are those of one after the other."""
    lengths = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    lengths += ["batch.rungs=(1.5,2.0)", "batch.seconds=16.0"]  # beside 1.0
    for n in range(24):
        seconds, random = (1.1, 1.6, 2.1)[n % 3], np.random.default_rng(n)
        path = tmp_path / "tones" / f"speaker{n // 3 % 3}" / f"noise{n}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * random.normal(size=round(seconds * 16_000)), 16_000)
    project = tones.make_project(tmp_path, *TRAINING, *lengths)
    config = tones.get_config(project, *TRAINING, *lengths, "train.num_steps=8")
    make_step, done = train.make_step, []
    num_samples_N = Corpus(tmp_path / "work" / "corpus").split("validation").num_samples
    settings = batches.BatchConfig(**config.batch)
    validated = batches.validation_batches(num_samples_N, settings, row_multiple=8)
    num_validated = len({(len(batch.weights_B), batch.num_samples) for batch in validated})

    class Noted:
        def __init__(self, step):
            self.step = step

        def lower(self, *args):
            done.append("compile")
            return self.step.lower(*args)

        def __call__(self, *args):
            done.append("run")
            return self.step(*args)

    monkeypatch.setattr(train, "make_step", lambda *args, **rest: Noted(make_step(*args, **rest)))
    losses = []
    for at_once in (False, True):
        monkeypatch.setattr(stopping, "compiles_at_once", lambda at_once=at_once: at_once)
        workdir = epath.Path(tmp_path / f"work{at_once}")
        shutil.copytree(project / "work", workdir)
        done.clear()
        jax.clear_caches()
        with compilations() as compiled:
            pretrain.run(config, workdir)
        assert done.count("compile") == compiled.count("jit(step)") == 3 < done.count("run")
        assert (done[:3] == 3 * ["compile"]) == at_once
        assert compiled.count("jit(evaluate)") == num_validated
        lines = logs.read_metrics(workdir / "it1" / "logs" / "metrics.jsonl")
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 7
