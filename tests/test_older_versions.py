# SPDX-License-Identifier: Apache-2.0
"""Work directories of older versions, as those versions wrote them: a run in them goes on.

goldens/work-VERSION.tar.xz: the demo's it1, made smaller by FLAGS, of six files of tones, from
`hubert prepare` to step 20 of `hubert pretrain`; then checkpoint 20 was removed. Version 0.1.0 is
of commit 9d52794, 0.2.0 of the one before 56b8476.
"""

import pathlib
import tarfile

import pytest
from etils import epath

from hubert_jax import checkpoints, config_files, logs
from hubert_jax.data import arrays, cards
from hubert_jax.stages import cluster, doctor, features, label, pretrain, run
from tests.tones import DEMO, SIZES

GOLDENS = pathlib.Path(__file__).parent / "goldens"
VERSIONS = sorted(path.name[5:-7] for path in GOLDENS.glob("work-*.tar.xz"))
FLAGS = [
    "corpus.train=tones", *SIZES, "batch.seconds=16.0", "train.num_steps=20",
    "train.report_every=1", "train.validate_every=10", "checkpoints.every=10",
    "checkpoints.keep_last=2", "features.layer=1",
]  # fmt: skip


def settings(iteration: str):
    return config_files.load(f"{DEMO}:{iteration}", [f"--config.{flag}" for flag in FLAGS])


@pytest.fixture(params=VERSIONS)
def workdir(request, tmp_path, monkeypatch) -> epath.Path:
    name = f"work-{request.param}"
    with tarfile.open(GOLDENS / f"{name}.tar.xz") as archive:
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since 3.11.4
        archive.extractall(tmp_path, **filters)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)  # its cards know the audio as tones/
    assert cards.read(epath.Path(name) / "corpus" / "card.json")["versions"]["hubert_jax"] in name
    return epath.Path(name)


def masked_losses(workdir: epath.Path) -> dict[int, float]:
    """By step; the last report is of two."""
    lines = logs.read_metrics(workdir / "it1" / "logs" / "metrics.jsonl")
    name = "train/masked_loss"
    return {int(line["step"]): line[name] for line in lines if name in line}


def test_there_are_older_versions():
    assert VERSIONS == ["0.1.0", "0.2.0"]


def test_a_run_of_an_older_version_goes_on(workdir, capsys):
    before = masked_losses(workdir)
    assert {9, 11, 18, 20} <= before.keys()
    for stage in (features, cluster, label):
        stage.run(settings("it1"), workdir)
    assert capsys.readouterr().out.count("done before") == 4
    pretrain.run(settings("it1"), workdir)
    assert "going on after step 10" in capsys.readouterr().out
    assert checkpoints.resolve(workdir / "it1" / "checkpoints").name == "20"
    assert masked_losses(workdir) == pytest.approx(before, rel=1e-4)
    # The next iteration, on what both versions have made.
    for name in ("features", "cluster", "label"):
        run.walk(name, settings("it2"), workdir, place=name)
    assert arrays.Store(workdir / "it2" / "labels" / "train").card["rate"] == 50


def test_the_doctor_says_what_it_cannot_know_of_an_older_run(workdir):
    found = doctor.examine([settings("it1")], workdir)
    assert not [finding for finding in found if finding.level == "stop" and "it1" in finding.what]
    (versions,) = [finding for finding in found if finding.what == "versions it1"]
    assert versions.level == "look" and "hubert_jax 0." in versions.reason
