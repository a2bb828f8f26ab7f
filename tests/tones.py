# SPDX-License-Identifier: Apache-2.0
"""A small project: six files of tones, made into a corpus, features, a codebook and labels."""

import pathlib

import numpy as np
import soundfile
from etils import epath

from hubert_jax import config_files
from hubert_jax.stages import prepare, run

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"
NUM_CODES = 8
SIZES = (
    "corpus.num_workers=0", "corpus.num_shards=1", "corpus.validation_share=0.34",
    f"kmeans.num_codes={NUM_CODES}", "kmeans.seed_rows=400", "kmeans.num_restarts=1",
    "kmeans.batch_rows=200", "features.batch_seconds=8.0", "features.num_shards=2",
    "model.conv_width=8", "model.width=16", "model.ffn_width=32", "model.num_layers=1",
    "model.position_kernel=16", "model.position_groups=2", "head.code_width=8",
    "batch.rungs=(1.0,)", "batch.min_seconds=1.0", "batch.row_multiple=8", "optim.warmup_steps=1",
)  # fmt: skip


def flags(folder: pathlib.Path, *more: str) -> list[str]:
    return [f"--config.{field}" for field in (f"corpus.train={folder / 'tones'}", *SIZES, *more)]


def get_config(folder: pathlib.Path, *more: str):
    return config_files.load(f"{DEMO}:it1", flags(folder, *more))


def make_project(folder: pathlib.Path, *more: str) -> pathlib.Path:
    """FOLDER/tones, and a work directory FOLDER/work in which it1 has its labels."""
    write(folder / "tones")
    config, workdir = get_config(folder, *more), epath.Path(folder / "work")
    prepare.run(config, workdir)
    for stage in run.arrows_of(config, workdir)[:3]:
        run.walk(stage, config, workdir, place=stage)
    return folder


def write(folder: pathlib.Path) -> None:
    """The six files, of three speakers, with phone times that mean nothing."""
    for n in range(6):
        rng = np.random.default_rng(n)
        time = np.arange(4_000) / 16_000
        tones = [np.sin(2 * np.pi * 200 * 1.4**p * time) for p in rng.integers(0, 8, 10)]
        num_samples = 40_000 - 100 * n
        audio_S = 0.2 * np.concatenate(tones)[:num_samples] + 0.01 * rng.normal(size=num_samples)
        path = folder / f"speaker{n % 3}" / f"{n}.{'wav' if n % 2 else 'flac'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio_S, 16_000)
        path.with_suffix(".phn").write_text(f"0 8000 a\n8000 {num_samples} b\n")
