# SPDX-License-Identifier: Apache-2.0
"""A run in the middle in which all is well, and what the doctor says of one."""

import json
import pathlib

import numpy as np
import soundfile
from etils import epath

from hubert_jax import config_files
from hubert_jax.data import arrays, cards, codebooks
from hubert_jax.data.corpus import Corpus
from hubert_jax.doctor import findings
from hubert_jax.ops import frames
from hubert_jax.stages import doctor, prepare

DEMO = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"
SAMPLE_RATE, NUM_CODES = 16_000, 20


def speech(seed: int, *, seconds: float = 2.5) -> np.ndarray:
    """Noise that swells and fades a few times a second, never silent for long."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.03 + 0.1 * np.sin(12 * time) ** 2) * rng.normal(size=len(time)).clip(-3, 3)


def write_audio(root: pathlib.Path, *, change=lambda n, wave: wave, rate: int = SAMPLE_RATE):
    """24 recordings of six speakers to train on, six of three others; `change` sees each."""
    for n in range(30):
        part, speaker = ("train", n % 6) if n < 24 else ("validation", 6 + n % 3)
        path = root / part / f"speaker{speaker}" / f"{n}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, change(n, speech(n)), rate, subtype="PCM_16")


def get_config(root: pathlib.Path, **changes):
    fields = {
        "corpus.train": root / "train", "corpus.validation": root / "validation",
        "corpus.num_workers": 0, "corpus.num_shards": 1, "kmeans.num_codes": NUM_CODES,
        "batch.row_multiple": 8, "batch.seconds": 16.1, "train.num_steps": 300,
        "optim.warmup_steps": 30, "checkpoints.every": 100, "features.sample_share": 1.0,
    } | {name.replace("__", "."): value for name, value in changes.items()}  # fmt: skip
    return config_files.load(f"{DEMO}:it1", [f"--config.{k}={v}" for k, v in fields.items()])


def codes_of(num_frames: int, seed: int) -> np.ndarray:
    """Codes that last about eight frames of 10 ms, all about equally frequent."""
    rng = np.random.default_rng(seed)
    runs = rng.integers(3, 14, num_frames)
    return np.repeat(rng.integers(0, NUM_CODES, num_frames), runs)[:num_frames].astype(np.int16)


def write_labels(workdir: epath.Path, *, change=lambda codes: codes, corpus_id: str = "") -> None:
    """A codebook and labels, as `hubert cluster` and `hubert label` leave them."""
    corpus, folder = Corpus(workdir / "corpus"), workdir / "it1"
    codebook = folder / "codebook.npz"
    centers_CD = np.random.default_rng(0).normal(size=(NUM_CODES, 39)).astype(np.float32)
    codebooks.write(codebook, centers_CD, made_from={}, source={}, rate=100, arrays={})
    for name in corpus.splits:
        split = corpus.split(name)
        lengths = frames.num_frames(split.num_samples, hop=frames.MFCC_HOP)
        arrays.write_store(
            folder / "labels" / name, ids=split.ids, lengths=lengths, width=None, dtype="int16",
            num_shards=2,
            produce=lambda rows, n=lengths: [(row, change(codes_of(n[row], row))) for row in rows],
            card=cards.new(
                "labels", made_from={}, corpus=corpus_id or corpus.card["fingerprint"],
                codebook=cards.digest(codebook), num_codes=NUM_CODES, rate=100,
            ),
        )  # fmt: skip


def write_metrics(workdir: epath.Path, *, change=lambda row: row) -> None:
    """A loss that falls as it should."""
    lines = []
    for step in range(20, 301, 20):
        row = {
            "masked_loss": 3.0 * 0.97 ** (step / 20), "masked_accuracy": step / 400,
            "predicted_perplexity": min(2 + step / 20, 15.0), "label_perplexity": 16.0,
            "audio_seconds": 16.0, "audio_seconds_per_second": 40.0,
            "seconds_waited_for_data": 0.1, "skipped": 0.0, "gradient_norm": 2.0,
            "feature_spread": 0.8,
        }  # fmt: skip
        row = change(row | {"step": step})
        spread = row.pop("feature_spread")
        lines.append(json.dumps({k if k == "step" else f"train/{k}": v for k, v in row.items()}))
        lines.append(json.dumps({"step": step, "validation/feature_spread": spread}))
    path = pathlib.Path(workdir / "it1" / "logs" / "metrics.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def make(folder: pathlib.Path) -> tuple[pathlib.Path, epath.Path]:
    """(audio, work directory)."""
    write_audio(folder / "audio")
    workdir = epath.Path(folder / "work")
    prepare.run(get_config(folder / "audio"), workdir)
    write_labels(workdir)
    write_metrics(workdir)
    return folder / "audio", workdir


def not_ok(config, workdir) -> dict[str, findings.Finding]:
    return {f.what: f for f in doctor.examine([config], workdir) if f.level != "ok"}


def by_what(config, workdir) -> dict[str, findings.Finding]:
    return {finding.what: finding for finding in doctor.examine([config], workdir)}
