# SPDX-License-Identifier: Apache-2.0
"""A corpus in memory for the stages that read one, and a work directory for the doctor."""

import numpy as np
import pytest

from hubert_jax.data.utterance import Intervals
from tests.stages import doctor_project

PHONES = ("a", "s", "sil")


class MemorySplit:
    """Utterances of tones and noise that change every 100 ms: three phones with exact times."""

    def __init__(self, name: str, num_samples: list[int], *, has_phones: bool):
        self.name = name
        self.num_samples = np.array(num_samples)
        self.ids = [f"{name}/{number}" for number in range(len(num_samples))]
        self._has_phones = has_phones
        self.reads: list[int] = []

    def audio(self, position: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        self.reads.append(position)
        rng = np.random.default_rng(position)
        samples = np.arange(self.num_samples[position])
        sounds = np.stack(
            [
                0.2 * np.sin(samples * 0.2) + 0.2 * np.sin(samples * 0.6),
                0.2 * rng.standard_normal(len(samples)),
                0.001 * rng.standard_normal(len(samples)),
            ]
        )
        return sounds[self._kinds(position), samples].astype(np.float32)[start:stop]

    def phones(self, position: int) -> Intervals | None:
        if not self._has_phones:
            return None
        starts = np.arange(0, self.num_samples[position], 1_600)
        stops = np.minimum(starts + 1_600, self.num_samples[position])
        kinds = self._kinds(position)[starts]
        return Intervals(starts, stops, tuple(PHONES[kind] for kind in kinds))

    def _kinds(self, position: int) -> np.ndarray:
        """The phone at every sample."""
        num_samples = int(self.num_samples[position])
        drawn = np.random.default_rng(100 + position).integers(0, 3, num_samples // 1_600 + 1)
        return drawn.repeat(1_600)[:num_samples]


class MemoryCorpus:
    splits = ("train", "validation", "test")

    def __init__(self) -> None:
        self.card = {"fingerprint": "sha256:corpus"}
        self._splits = {
            "train": MemorySplit("train", [9_000, 16_000, 399, 12_345, 8_000], has_phones=True),
            "validation": MemorySplit("validation", [16_000, 7_000], has_phones=True),
            "test": MemorySplit("test", [5_000], has_phones=False),
        }

    def split(self, name: str) -> MemorySplit:
        return self._splits[name]


@pytest.fixture
def memory_corpus(monkeypatch) -> MemoryCorpus:
    """The corpus that `hubert features` and `hubert label` open, whatever folder they name."""
    from hubert_jax.stages import features, label

    corpus = MemoryCorpus()
    for stage in (features, label):
        monkeypatch.setattr(stage, "Corpus", lambda folder: corpus)
    return corpus


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """(audio, work directory) of a run in the middle, in which all is well."""
    return doctor_project.make(tmp_path_factory.mktemp("doctor"))
