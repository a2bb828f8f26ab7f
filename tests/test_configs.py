# SPDX-License-Identifier: Apache-2.0
"""Every config of every iteration has exactly the fields that the code reads."""

import ast
import pathlib

import jax
import pytest

from hubert_jax import (
    checkpoints,
    config_files,
    extract,
    heads,
    model,
    optim,
    pretraining,
    sharding,
)
from hubert_jax.data import batches, synth
from hubert_jax.ops import kmeans
from hubert_jax.stages import prepare, pretrain

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
DATACLASSES = {
    "corpus": prepare.CorpusConfig,
    "features": extract.FeaturesConfig,
    "kmeans": kmeans.KMeansConfig,
    "model": model.HubertConfig,
    "head": heads.HeadConfig,
    "loss": pretraining.LossConfig,
    "batch": batches.BatchConfig,
    "optim": optim.OptimConfig,
    "train": pretrain.TrainConfig,
    "checkpoints": checkpoints.CheckpointConfig,
}
CASES = [
    pytest.param(path, iteration, id=f"{path.stem}:{iteration}")
    for path in CONFIGS
    for iteration in config_files.load(str(path)).iterations
]


@pytest.mark.parametrize(("path", "iteration"), CASES)
def test_sections_are_what_the_code_reads(path, iteration):
    config = config_files.load(f"{path}:{iteration}")
    assert config.iteration == iteration
    for section, dataclass in DATACLASSES.items():
        dataclass(**config[section])
    if config.corpus.train == "synth":
        synth.SynthConfig(**config.corpus.synth)


@pytest.mark.parametrize(("path", "iteration"), CASES)
def test_models_build_abstractly_and_shard(path, iteration):
    config = config_files.load(f"{path}:{iteration}")
    model_config, head = model.HubertConfig(**config.model), heads.HeadConfig(**config.head)
    built = heads.abstract(model_config, head, (config.kmeans.num_codes,))
    millions = sum(leaf.size for leaf in jax.tree.leaves(built.encoder)) / 1e6
    published = {"base": 94.4, "large": 315.4, "xlarge": 962.5}  # of fairseq's encoders
    if path.stem in published:
        assert millions == pytest.approx(published[path.stem], rel=2e-3)
    mesh = sharding.make_mesh(**config.mesh)
    assert len(jax.tree.leaves(sharding.param_shardings(mesh, built))) > 30
    if config.train.num_steps:
        optim.adamw(optim.OptimConfig(**config.optim), num_steps=config.train.num_steps)


@pytest.mark.parametrize(("path", "iteration"), CASES)
def test_layers_come_from_models_that_are_trained(path, iteration):
    config = config_files.load(f"{path}:{iteration}")
    if config.features.kind == "mfcc":
        assert config.features.checkpoint == "" and iteration == config.iterations[0]
        return
    if "/" in config.features.checkpoint:  # another run's, of base
        assert config.features.layer == 9
        return
    teacher = config_files.load(f"{path}:{config.features.checkpoint}")
    assert teacher.train.num_steps > 0
    assert 0 < config.features.layer <= teacher.model.num_layers
    order = list(config.iterations)
    assert order.index(teacher.iteration) < order.index(iteration)


@pytest.mark.parametrize(
    ("name", "iteration", "layers", "width", "seconds", "lr", "clip", "steps", "codes"),
    [
        ("base", "it1", 12, 768, 2800, 5e-4, 10, 250_000, 100),
        ("base", "it2", 12, 768, 2800, 5e-4, 10, 400_000, 500),
        ("large", "it1", 24, 1024, 7200, 1.5e-3, 1, 400_000, 500),
        ("xlarge", "it1", 48, 1280, 5760, 3e-3, 1, 400_000, 500),
    ],
)
def test_rows_of_the_paper(name, iteration, layers, width, seconds, lr, clip, steps, codes):
    config = config_files.load(f"{CONFIGS[0].parent / name}.py:{iteration}")
    assert (config.model.num_layers, config.model.width) == (layers, width)
    assert config.model.ffn_width == 4 * width
    assert (config.batch.seconds, config.optim.peak_lr) == (seconds, lr)
    assert (config.optim.clip_norm, config.train.num_steps) == (clip, steps)
    assert config.optim.warmup_steps == 0.08 * steps
    assert config.kmeans.num_codes == codes
    assert config.loss.penalty == 10 and config.loss.unmasked_weight_start == 0


def test_a_teacher_from_the_command_line_reaches_the_first_iteration_alone():
    path = CONFIGS[0].parent / "large.py"
    teacher = ["--config.teacher=elsewhere/it2/checkpoints"]
    first, units = (config_files.load(f"{path}:{it}", teacher) for it in ("it1", "units"))
    assert first.features.checkpoint == "elsewhere/it2/checkpoints"
    assert units.features.checkpoint == "it1"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_names_its_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"hubert run --config=configs/{path.name} --workdir=" in docstring
