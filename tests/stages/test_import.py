# SPDX-License-Identifier: Apache-2.0
"""Moving in the middle of a project: codebooks and labels come in, go out, and `run` goes on."""

import pathlib
import shutil
import subprocess
import sys

import joblib
import numpy as np
import pytest
import soundfile
from etils import epath

from hubert_jax import cli
from hubert_jax.data import arrays, cards, fairseq_files
from hubert_jax.data.corpus import Corpus
from hubert_jax.ops import frames
from hubert_jax.stages import export, import_, label, prepare, pretrain, run
from tests import tones
from tests.tones import DEMO, NUM_CODES

TRAINING = ("batch.seconds=16.0", "train.num_steps=2")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tones.make_project(tmp_path_factory.mktemp("project"), *TRAINING)


def flags(folder: pathlib.Path, *more: str) -> list[str]:
    return tones.flags(folder, *TRAINING, *more)


def get_config(folder: pathlib.Path, *more: str):
    return tones.get_config(folder, *TRAINING, *more)


@pytest.fixture
def workdir(project, tmp_path) -> epath.Path:
    """A new work directory with the project's corpus."""
    shutil.copytree(project / "work" / "corpus", tmp_path / "new" / "corpus")
    return epath.Path(tmp_path / "new")


def import_into(workdir, project, what: str, path, *words: str) -> None:
    import_.main(
        [what, f"--path={path}", f"--config={DEMO}:it1", f"--workdir={workdir}", *flags(project)]
        + list(words)
    )


@pytest.fixture
def centers(project, tmp_path) -> epath.Path:
    path = epath.Path(tmp_path / "km.npy")
    export.main(["codebook", f"--codebook={project}/work/it1/codebook.npz", f"--out={path}"])
    return path


@pytest.fixture
def exported(project, tmp_path) -> pathlib.Path:
    """The project's labels, as fairseq has them."""
    export_labels(project / "work", tmp_path / "fairseq")
    return tmp_path / "fairseq"


def export_labels(workdir, out, *words: str) -> None:
    export.main(
        ["labels", f"--labels={workdir}/it1/labels", f"--corpus={workdir}/corpus", f"--out={out}"]
        + list(words)
    )


def assert_same_labels(workdir, project) -> None:
    for split in ("train", "validation"):
        ours = arrays.Store(project / "work" / "it1" / "labels" / split)
        theirs = arrays.Store(workdir / "it1" / "labels" / split)
        assert set(theirs.ids) == set(ours.ids) and theirs.dtype == ours.dtype == np.int16
        for id_ in ours.ids:
            np.testing.assert_array_equal(theirs[id_], ours[id_])
        for field in ("kind", "corpus", "num_codes", "rate", "used_codes", "perplexity", "scores"):
            assert theirs.card[field] == ours.card[field]
        assert theirs.card["scores"] is not None


# Codebooks.


def test_an_imported_codebook_labels_as_the_one_it_came_from(project, workdir, centers, capsys):
    assert np.load(centers).shape == (NUM_CODES, 39)
    np.save(centers, np.load(centers).astype(np.float64))
    import_into(workdir, project, "codebook", centers)
    ours = cards.read(project / "work" / "it1" / "codebook.json")
    card = cards.read(workdir / "it1" / "codebook.json")
    for field in ("kind", "source", "rate", "num_codes", "width"):
        assert card[field] == ours[field]
    assert card["made_from"] == {"imported": cards.digest(centers), "source": {"kind": "mfcc"}}
    assert card["digest"] == cards.digest(workdir / "it1" / "codebook.npz")
    label.run(get_config(project), workdir)
    assert_same_labels(workdir, project)
    import_into(workdir, project, "codebook", centers)
    assert "codebook.npz: imported before" in capsys.readouterr().out


def test_codebooks_that_do_not_fit_are_refused(project, workdir, centers, tmp_path):
    centers_CD = np.load(centers)
    for array, message in (
        (centers_CD[:, :13], r"x\.npy: 8 centres of width 13, but the features of it1 are 39 wide"),
        (centers_CD.T, r"x\.npy: 39 centres of width 8.* are they rows"),
        (centers_CD[:5], r"5 codes, kmeans\.num_codes of it1 is 8;.*--config\.kmeans\.num_codes=5"),
    ):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=message):
            import_into(workdir, project, "codebook", tmp_path / "x.npy")
    assert not (workdir / "it1").exists()
    import_into(workdir, project, "codebook", centers)
    np.save(centers, centers_CD + 1)
    with pytest.raises(ValueError, match=r"made_from\.imported is 'sha256:.*remove .*codebook\.\*"):
        import_into(workdir, project, "codebook", centers)
    with pytest.raises(ValueError, match=r"made_from\..*remove .*it1/codebook\.\*"):
        import_into(project / "work", project, "codebook", centers)  # made there


def test_joblib_is_refused_on_the_command_line(project, workdir, centers, tmp_path, capsys):
    joblib.dump(np.load(centers), tmp_path / "km.bin")
    with pytest.raises(SystemExit) as exit_:
        cli.main(
            ["import", "codebook", f"--path={tmp_path / 'km.bin'}", f"--config={DEMO}:it1"]
            + [f"--workdir={workdir}", *flags(project)]
        )
    err = capsys.readouterr().err
    assert exit_.value.code == 1 and "Traceback" not in err
    assert "hubert import: error:" in err and "python -c 'import joblib, numpy\n" in err


def test_export_says_how_fairseq_gets_its_joblib(project, centers, capsys):
    export.main(["codebook", f"--codebook={project}/work/it1/codebook.npz", f"--out={centers}"])
    out = capsys.readouterr().out
    command = out[out.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    fitted = joblib.load(centers.with_suffix(".bin"))  # as ApplyKmeans does
    np.testing.assert_array_equal(fitted.cluster_centers_.transpose(), np.load(centers).T)
    with pytest.raises(ValueError, match=r"km\.bin: centres are written as \.npy"):
        export.main(["codebook", "--codebook=x.npz", f"--out={centers.with_suffix('.bin')}"])


# Labels.


def test_exported_labels_come_back_the_same(project, workdir, exported):
    import_into(workdir, project, "labels", exported)
    assert_same_labels(workdir, project)
    stores = pretrain.open_labels(workdir, ("it1",), Corpus(workdir / "corpus"))
    assert {s.card["codebook"] for split in stores.values() for s in split} == {
        cards.digest(exported / "train.km")
    }


@pytest.mark.parametrize("words", [(), ("--audio={}",)])
def test_files_of_fairseq_come_back_byte_for_byte(project, workdir, exported, tmp_path, words):
    root = str(project / "tones")
    for name in ("train", "valid"):  # in another order, as fairseq's own scripts write them
        head, *rows = (exported / f"{name}.tsv").read_text().splitlines(keepends=True)
        lines = (exported / f"{name}.km").read_text().splitlines(keepends=True)
        assert head == f"{root}\n" and len(rows) == len(lines) and rows[0].count("speaker")
        (exported / f"{name}.tsv").write_text(head + "".join(rows[::-1]))
        (exported / f"{name}.km").write_text("".join(lines[::-1]))
    import_into(workdir, project, "labels", exported)
    export_labels(workdir, tmp_path / "again", *(word.format(root) for word in words))
    names = ["dict.km.txt", "train.km", "train.tsv", "valid.km", "valid.tsv"]
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["card.json", *names]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert (exported / "dict.km.txt").read_text() == "".join(f"{n} 1\n" for n in range(NUM_CODES))
    manifest = fairseq_files.read_manifest(exported / "train.tsv")
    for path, num_samples in manifest.rows:
        assert soundfile.info(pathlib.Path(manifest.root) / path).frames == num_samples


def test_labels_are_compared_with_the_codebook(project, workdir, centers, exported, capsys):
    import_into(workdir, project, "codebook", centers)
    lines = (exported / "valid.km").read_text()
    other = "".join(str((int(c) + 1) % NUM_CODES) if c.isdigit() else c for c in lines)
    (exported / "valid.km").write_text(other)
    with pytest.raises(
        ValueError, match=r"valid\.km: \d+ of \d+ labels of 2 utterances are what .*codebook\.npz"
    ):
        import_into(workdir, project, "labels", exported)
    (exported / "valid.km").write_text(lines)
    assert not (workdir / "it1" / "labels").exists()
    capsys.readouterr()
    import_into(workdir, project, "labels", exported)
    out = capsys.readouterr().out
    num_frames = sum(len(line.split()) for line in lines.splitlines())
    assert f"valid.km: {num_frames} of {num_frames} labels compared are the codebook's" in out
    assert "labels validation:" in out and "PNMI" in out
    pretrain.open_labels(workdir, ("it1",), Corpus(workdir / "corpus"))
    card = cards.read(workdir / "it1" / "labels" / "train" / "card.json")
    assert card["codebook"] == cards.digest(workdir / "it1" / "codebook.npz")


def test_a_codebook_that_comes_after_the_labels_is_noticed(project, workdir, centers, exported):
    import_into(workdir, project, "labels", exported)
    import_into(workdir, project, "codebook", centers)
    refusal = r"labels/train/card\.json: codebook is 'sha256:.*remove .*labels/train"
    with pytest.raises(ValueError, match=refusal):
        label.run(get_config(project), workdir)
    with pytest.raises(ValueError, match=refusal):
        pretrain.open_labels(workdir, ("it1",), Corpus(workdir / "corpus"))


def test_labels_that_do_not_fit_are_refused(project, workdir, exported):
    files = {path.name: path.read_text() for path in exported.iterdir()}

    def refused(message: str, *words: str, **changes: str | None) -> None:
        for name, text in files.items():
            changed = changes.get(name.replace(".", "_"), text)
            (exported / name).unlink(missing_ok=True)
            if changed is not None:
                (exported / name).write_text(changed)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            import_into(workdir, project, "labels", exported, *words)
        assert not (workdir / "it1" / "labels" / "train").exists()

    first, *rest = files["train.km"].splitlines(keepends=True)
    root, row, *rows = files["train.tsv"].splitlines(keepends=True)
    id_, samples = row.split(".")[0], int(row.split("\t")[1])
    want = frames.num_frames(samples, hop=160)
    short = "".join([first.partition(" ")[2], *rest])
    refused(rf"line 1: utterance '{id_}' has {want - 1} labels, its {samples} .* have {want};"
            r".*--rate=50", train_km=short)  # fmt: skip
    refused(rf"utterance '{id_}' has {want} labels, .* at 50 labels per second", "--rate=50")
    refused(r"train\.km: 3 lines of labels for 4", train_km="".join(rest))
    refused(rf"no labels for 1 of 4 utterances, '{id_}'",
            train_tsv="".join([root, *rows]), train_km="".join(rest))  # fmt: skip
    refused(r"line 1: labels from \d to 8, but there are 8 codes", train_km="8 " + short)
    refused(r"5 codes, kmeans\.num_codes of it1 is 8", dict_km_txt="0 1\n1 1\n2 1\n3 1\n4 1\n")
    refused(r"no valid\.tsv or validation\.tsv; labels come with the manifest", valid_tsv=None)
    refused(r"train\.km: no labels beside train\.tsv", train_km=None)
    shutil.copy(exported / "valid.tsv", exported / "validation.tsv")
    refused(r"valid\.tsv or validation\.tsv\? Both are there")


def test_labels_come_for_all_splits_or_none(project, workdir, exported):
    """What one split refuses keeps the others from being written."""
    import_into(workdir, project, "labels", exported)
    (workdir / "it1" / "labels" / "train").rmtree()
    labels = exported / "valid.km"
    other = "".join(str(7 - int(c)) if c.isdigit() else c for c in labels.read_text())
    labels.write_text(other)
    with pytest.raises(ValueError, match=r"validation/card\.json: made_from\.\w+.*--workdir"):
        import_into(workdir, project, "labels", exported)
    assert not (workdir / "it1" / "labels" / "train").exists()


def test_exported_labels_overwrite_nothing(project, tmp_path, exported):
    (tmp_path / "theirs").mkdir()
    for name in ("train.km", "valid.tsv", "dict.km.txt"):
        path = tmp_path / "theirs" / name
        path.write_text("theirs")
        with pytest.raises(
            ValueError, match=rf"theirs/{name} is there already, .* another --out, or remove it"
        ):
            export_labels(project / "work", tmp_path / "theirs")
        assert [p.read_text() for p in (tmp_path / "theirs").iterdir()] == ["theirs"]
        path.unlink()
    export_labels(project / "work", exported)  # ours, and there already
    card = cards.read(exported / "card.json")
    cards.write(exported / "card.json", card | {"made_from": card["made_from"] | {"codebook": "x"}})
    with pytest.raises(ValueError, match=r"made_from\.codebook is 'x'.* choose another --out$"):
        export_labels(project / "work", exported)


def test_labels_without_a_dictionary_have_the_configs_codes(project, workdir, exported):
    (exported / "dict.km.txt").unlink()
    for suffix in (".tsv", ".km"):
        (exported / f"valid{suffix}").rename(exported / f"validation{suffix}")
    import_into(workdir, project, "labels", exported)
    assert_same_labels(workdir, project)


def test_labels_of_audio_that_is_not_there_are_not_exported(project, workdir, tmp_path, exported):
    import_into(workdir, project, "labels", exported)
    for words, message in (
        ((f"--audio={project / 'tones' / 'speaker0'}",),
         r"train: \d of 4 utterances are no files below .*speaker0, 'speaker\d/\d' for one; give"),
        ((f"--audio={tmp_path / 'gone'}",), r"train: .*gone does not exist.*--audio=FOLDER"),
        (("--audio=synth",), r"train: its audio is 'synth', but fairseq reads files below one"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            export_labels(workdir, tmp_path / "out", *words)
    with pytest.raises(FileNotFoundError, match=r"none: no labels; WORK/<iteration>/labels"):
        export.main(
            ["labels", f"--labels={tmp_path / 'none'}", f"--corpus={workdir}/corpus"]
            + [f"--out={tmp_path / 'out'}"]
        )
    assert not (tmp_path / "out").exists()


def test_recordings_that_were_cut_take_part_of_a_line(
    project, workdir, centers, exported, tmp_path
):
    (workdir / "corpus").rmtree()
    prepare.run(get_config(project, "corpus.max_seconds=1.5", "corpus.min_seconds=0.2"), workdir)
    import_into(workdir, project, "codebook", centers)
    import_into(workdir, project, "labels", exported)  # half a frame off, and still the codebook's
    stored = arrays.Store(workdir / "it1" / "labels" / "train")
    assert len(stored) > 4 and all("--0" in id_ for id_ in stored.ids)
    pretrain.open_labels(workdir, ("it1",), Corpus(workdir / "corpus"))
    with pytest.raises(ValueError, match=r"'.*--0000' for one; it is a piece.*corpus\.max_seconds"):
        export_labels(workdir, tmp_path / "out")


# And on.


@pytest.mark.parametrize("what", ["codebook", "labels"])
def test_run_goes_on_from_what_was_imported(project, workdir, centers, exported, what, capsys):
    import_into(workdir, project, what, centers if what == "codebook" else exported)
    digests = {path: cards.digest(path) for path in pathlib.Path(workdir).rglob("*.np[yz]")}
    trains = what == "labels"  # once is enough, it takes its time
    config = get_config(project, f"train.num_steps={2 * trains}")
    config.iterations = ("it1",)
    for _ in range(2):
        run.run(lambda _: config, workdir)
    out = capsys.readouterr().out
    assert ("[it1 1/2] label" if trains else "[it1 1/1] label") in out and "MFCC" in out
    assert_same_labels(workdir, project)
    pretrain.open_labels(workdir, ("it1",), Corpus(workdir / "corpus"))
    assert (workdir / "it1" / "checkpoints" / "2").exists() == trains
    assert out.count("done before, 2 steps") == trains
    assert not (workdir / "it1" / "features").exists()
    assert {path: cards.digest(path) for path in digests} == digests
    assert (workdir / "it1" / "codebook.npz").exists() == (what == "codebook")
    assert ("  codebook     " in out) == (what == "codebook")


def test_a_dump_is_made_where_the_config_asks_for_it(project, workdir, centers):
    import_into(workdir, project, "codebook", centers)
    arrows = run.arrows_of(get_config(project, "features.dump=True"), workdir)
    assert arrows == ["features", "label", "pretrain"]


def test_cluster_leaves_an_imported_codebook_alone(project, workdir, centers, capsys):
    from hubert_jax.stages import cluster

    import_into(workdir, project, "codebook", centers)
    before = cards.digest(workdir / "it1" / "codebook.npz")
    cluster.run(get_config(project), workdir)
    assert "codebook.npz: imported before" in capsys.readouterr().out
    assert cards.digest(workdir / "it1" / "codebook.npz") == before
    with pytest.raises(ValueError, match=r"codebook\.json: num_codes is 8, expected 9"):
        cluster.run(get_config(project, "kmeans.num_codes=9"), workdir)


def test_a_split_that_no_labels_came_for(project, workdir, centers, exported, capsys, monkeypatch):
    """Labelled with the codebook where there is one; else it goes without."""
    monkeypatch.setitem(fairseq_files.NAMES, "validation", ("nothing",))
    monkeypatch.setattr(import_, "OPTIONAL", ("validation",))
    import_into(workdir, project, "labels", exported)
    assert "no nothing.tsv, so no labels for the split 'validation'" in capsys.readouterr().out
    label.run(get_config(project), workdir)
    assert "labels validation: none were imported, and there is no codebook" in (
        capsys.readouterr().out
    )
    (workdir / "it1" / "labels").rmtree()
    import_into(workdir, project, "codebook", centers)
    import_into(workdir, project, "labels", exported)
    label.run(get_config(project), workdir)
    assert_same_labels(workdir, project)


def test_the_command_line_asks_for_what_it_needs(project, capsys):
    for argv, message in (
        ([], "weights|codebook|labels"),
        (["codebook", "--path=x"], "--config, --workdir"),
        (["--path=x", "--out=y"], "--from"),  # weights
        (["weights", "--from=hf", "--path=x", "--out=y", "--config.seed=1"], "--config.seed=1"),
        (["labels", "--path=x", f"--config={DEMO}:it9", "--workdir=w"], "unknown iteration 'it9'"),
        (["labels", "--path=x", "--config=x", "--workdir=w", "--rate=16000"], "50, 100"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["import", *argv])
        assert exit_.value.code == 2 and message in capsys.readouterr().err
