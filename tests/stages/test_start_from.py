# SPDX-License-Identifier: Apache-2.0
"""Pretraining that goes on from imported weights, with their head or a new one."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from hubert_jax import checkpoints, logs, pretraining, train, weights
from hubert_jax.data import batches
from hubert_jax.data.corpus import Corpus
from hubert_jax.heads import HeadConfig, Hubert, Weights
from hubert_jax.interchange import formats
from hubert_jax.model import HubertConfig
from hubert_jax.stages import import_, pretrain
from tests import signals, tones
from tests.tones import NUM_CODES

TRAINING = ("batch.seconds=8.0", "train.num_steps=3", "train.report_every=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tones.make_project(tmp_path_factory.mktemp("project"), *TRAINING)


def get_config(folder: pathlib.Path, *more: str):
    return tones.get_config(folder, *TRAINING, *more)


def of_config(config, *, num_codes=(NUM_CODES,), seed=0, **changes) -> Weights:
    """A model that the config could have trained."""
    encoder = dataclasses.replace(HubertConfig(**config.model), **changes)
    empty = Weights(encoder, HeadConfig(**config.head), num_codes, None, {})
    rng = np.random.default_rng(seed)
    return empty._replace(arrays={
        name: (rng.uniform(0.5, 1.0, shape) if name.endswith(("scale", "gain_P"))
               else rng.normal(size=shape, scale=0.3)).astype(np.float32)
        for name, shape in empty.shapes().items()
    })  # fmt: skip


def imported(model: Weights, folder: pathlib.Path) -> pathlib.Path:
    formats.write(model, folder / "theirs", format_="hf")
    import_.main(["--from=hf", f"--path={folder / 'theirs'}", f"--out={folder / 'imported'}"])
    return folder / "imported"


def random_model(config) -> Hubert:
    key = jax.random.fold_in(jax.random.key(config.seed), pretrain.FOR_WEIGHTS)
    return Hubert(HubertConfig(**config.model), HeadConfig(**config.head), (NUM_CODES,), key=key)


def first_loss(model: Hubert, config, workdir) -> float:
    """The masked loss of the first batch, computed without the stage."""
    corpus = Corpus(workdir / "corpus")
    settings = batches.BatchConfig(**config.batch)
    plan = batches.Plan(
        corpus.split("train").num_samples, settings, seed=config.seed, row_multiple=8
    )
    labels = pretrain.open_labels(workdir, ("it1",), corpus)["train"]
    _, batch = next(batches.stream(
        corpus.split("train"), labels, plan, settings, first_step=0, num_steps=1,
        normalize=config.model.normalize_audio,
    ))  # fmt: skip
    key = jax.random.fold_in(jax.random.key(config.seed), pretrain.FOR_TRAINING)
    mask_key, dropout_key = jax.random.split(jax.random.fold_in(key, 0))
    (prediction,), _ = jax.jit(pretraining.predict)(model, batch, mask_key, dropout_key)
    return float(prediction.masked_loss / prediction.masked_frames)


def logged(workdir) -> list[float]:
    """Of the first step, and of those after it."""
    lines = logs.read_metrics(workdir / "it1" / "logs" / "metrics.jsonl")
    return [line["train/masked_loss"] for line in lines if "train/masked_loss" in line]


@pytest.fixture
def workdir(project, tmp_path) -> epath.Path:
    shutil.copytree(project / "work", tmp_path / "work")
    return epath.Path(tmp_path / "work")


def test_pretraining_goes_on_with_an_imported_head(project, workdir, tmp_path, monkeypatch):
    """The first loss is the imported model's; stopped and resumed, it does not start again."""
    config = get_config(project)
    start_from = imported(of_config(config), tmp_path)
    config.train.start_from, config.train.start_head = str(start_from), "kept"
    config.checkpoints.every = 100
    with monkeypatch.context() as patched, pytest.raises(train.Interrupted, match="after step 2"):
        signals.come(patched, call=2)
        pretrain.run(config, workdir)
    model, _ = checkpoints.load_model(start_from)
    wanted = first_loss(model, config, workdir)
    np.testing.assert_allclose(logged(workdir)[0], wanted, rtol=1e-5)
    assert abs(wanted - first_loss(random_model(config), config, workdir)) > 0.1

    folder = workdir / "it1" / "checkpoints"
    stopped, _ = checkpoints.load_weights(folder)
    monkeypatch.delattr(checkpoints, "start")
    facts = checkpoints.read_card(start_from)["made_from"]
    shutil.rmtree(start_from)  # was needed at the beginning only
    pretrain.run(config, workdir)
    assert checkpoints.resolve(folder).name == "3"
    ended, card = checkpoints.load_weights(folder)
    for name, array in ended.arrays.items():  # a third step is small, a new start is far
        before = np.abs(array - stopped.arrays[name]).max()
        since_start = np.abs(array - weights.to_named(model)[name]).max()
        assert before < 0.01 and before < since_start, name
    assert card["made_from"]["start"]["head"] == "kept"
    assert card["made_from"]["start"]["made_from"] == facts

    config.train.start_from = str(imported(of_config(config, seed=1), tmp_path / "other"))
    with pytest.raises(ValueError, match=r"made_from\.start\.made_from\.imported\.weights is 'sha"):
        pretrain.run(config, workdir)


def test_pretraining_goes_on_with_a_new_head(project, workdir, tmp_path):
    """Of as many codes as the labels have, on the imported encoder."""
    config = get_config(project)
    model = of_config(config, num_codes=(5,))
    start_from = imported(model, tmp_path)
    config.train.start_from, config.train.start_head = str(start_from), "new"
    pretrain.run(config, workdir)
    drawn = random_model(config)
    arrays = weights.to_named(drawn) | {
        name: jax.numpy.asarray(x)
        for name, x in model.arrays.items()
        if name.startswith("encoder.")
    }
    wanted = first_loss(weights.from_named(drawn, arrays), config, workdir)
    np.testing.assert_allclose(logged(workdir)[0], wanted, rtol=1e-5)
    assert abs(wanted - first_loss(drawn, config, workdir)) > 0.01
    trained, _ = checkpoints.load_weights(workdir / "it1" / "checkpoints")
    assert trained.num_codes == (NUM_CODES,)


def test_models_that_do_not_fit_the_config_are_refused(project, workdir, tmp_path):
    config = get_config(project)
    ours = of_config(config).abstract()
    assert config.model.pre_norm and config.model.conv_norm == "group"

    def refused(message: str, model: Weights, *, head: str = "kept") -> pathlib.Path:
        start_from = imported(model, tmp_path / str(len(list(tmp_path.iterdir()))))
        with pytest.raises(ValueError, match=message):
            checkpoints.start(ours, start_from, head=head)
        return start_from

    for field, value in (
        ("pre_norm", False), ("num_heads", 2), ("normalize_audio", True), ("conv_norm", "layer"),
    ):  # fmt: skip
        for head in ("kept", "new"):
            refused(rf"model\.{field} is {value!r}, the config has .*: train with "
                    rf"--config\.model\.{field}={value}", of_config(config, **{field: value}),
                    head=head)  # fmt: skip
    refused(r"encoder\.layers\.ffn_in\.bias has shape \(1, 48\), the model wants \(1, 32\)",
            of_config(config, ffn_width=48), head="new")  # fmt: skip
    model = of_config(config)
    headless = {name: x for name, x in model.arrays.items() if not name.startswith("head.")}
    refused(r"has no code prediction; give --config\.train\.start_head=new",
            model._replace(head=None, num_codes=(), arrays=headless))  # fmt: skip
    refused(r"its head predicts \(5, 3\) codes, the labels have \(8,\)",  # as many together
            of_config(config, num_codes=(5, 3)))  # fmt: skip
    refused(r"its head\.temperature is 0\.2, the config has 0\.1: train with --config\.head\.temp",
            model._replace(head=dataclasses.replace(model.head, temperature=0.2)))  # fmt: skip
    start_from = refused(r"its head predicts \(5,\) codes, the labels have .*start_head=new",
                         of_config(config, num_codes=(5,)))  # fmt: skip

    config.train.start_from = str(start_from)
    with pytest.raises(ValueError, match=r"its head predicts \(5,\) codes"):
        pretrain.run(config, workdir)
    assert not (workdir / "it1" / "checkpoints" / "card.json").exists()  # so mended, it runs
    with pytest.raises(ValueError, match=r"start_head is 'old': use 'kept' or 'new'"):
        pretrain.run(get_config(project, "train.start_head=old"), workdir)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        pretrain.run(get_config(project, f"train.start_from={tmp_path / 'gone'}"), workdir)
