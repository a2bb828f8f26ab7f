# SPDX-License-Identifier: Apache-2.0
"""hubert prepare on synthetic audio: splits, cuts, bad input, interruptions."""

import hashlib
import os
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
from etils import epath
from ml_collections import ConfigDict

from hubert_jax.data import cards, shards
from hubert_jax.data.corpus import Corpus
from hubert_jax.stages import prepare

SYNTH = dict(
    train_minutes=0.1,
    validation_minutes=0.05,
    train_voices=2,
    validation_voices=1,
    accents=("en",),
    words_per_minute=(150.0, 190.0),
    min_seconds=0.6,
    max_seconds=8.0,
    reverberation_seconds=(0.1, 0.2),
    direct_to_reverberant_db=(6.0, 12.0),
    snr_db=(20.0, 30.0),
    level_db=(-30.0, -20.0),
    seed=0,
)


def config(train, **fields):
    corpus = dict(
        train=str(train),
        validation="",
        test="",
        validation_share=0.3,
        exclude="",
        speaker_pattern="",
        min_seconds=0.2,
        max_seconds=1.0,
        max_rejected=0.0,
        num_shards=3,
        num_workers=0,
        synth={},
    )
    assert set(fields) <= set(corpus)
    return ConfigDict(dict(seed=0, corpus=corpus | fields))


def run(settings, workdir):
    prepare.run(settings, epath.Path(workdir))
    return Corpus(epath.Path(workdir) / "corpus")


def noise(path, seconds, *, rate=16_000, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate))
    soundfile.write(path, samples, rate, **options)


@pytest.fixture
def speech(tmp_path):
    """Four speakers with three utterances each, of three formats and rates."""
    for n in range(12):
        suffix, rate = (("flac", 16_000), ("wav", 8_000), ("ogg", 22_050))[n // 4]
        noise(tmp_path / "speech" / f"s{n % 4}" / f"u{n}.{suffix}", 0.5, rate=rate, seed=n)
    return tmp_path / "speech"


def contents(workdir):
    files = sorted(path for path in (workdir / "corpus").rglob("*") if path.is_file())
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_a_folder_becomes_a_corpus(speech, tmp_path, capsys):
    made = run(config(speech), tmp_path / "work")
    train, validation = made.split("train"), made.split("validation")
    assert sorted(train.ids + validation.ids) == sorted(f"s{n % 4}/u{n}" for n in range(12))
    assert not set(train.speakers) & set(validation.speakers)
    assert set(train.num_samples) | set(validation.num_samples) == {8_000}
    assert made.card["files_by_sample_rate"] == {"8000": 4, "16000": 4, "22050": 4}
    position = train.ids.index("s1/u1")
    (_, rate), stored = soundfile.read(speech / "s1" / "u1.flac"), train.record(position)["audio"]
    assert rate == 16_000 and stored == (speech / "s1" / "u1.flac").read_bytes()
    assert not (tmp_path / "work" / "corpus" / "unfinished").exists()
    said = capsys.readouterr().out
    assert "resampled from 8000 Hz: 4 files" in said and "train                9         3" in said

    shutil.rmtree(speech)  # what is made needs its sources no longer
    before = contents(tmp_path / "work")
    prepare.run(config(speech, num_workers=2, max_rejected=0.5), epath.Path(tmp_path / "work"))
    assert "is there" in capsys.readouterr().out and contents(tmp_path / "work") == before


def test_another_configuration_is_refused(speech, tmp_path):
    run(config(speech), tmp_path)
    with pytest.raises(ValueError, match=r"made_from.corpus.max_seconds is 1.0, this run has 2.0"):
        run(config(speech, max_seconds=2.0), tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_interruptions_and_workers_change_no_byte(speech, tmp_path, monkeypatch, num_workers):
    """Two folders and an archive, in which train and validation are mixed."""
    for n in range(8):
        folder = tmp_path / "tree" / "dev" / str(n % 4) / "1"
        noise(folder / f"{n % 4}-1-{n:04d}.flac", 0.4, seed=n)
        (folder / f"{n % 4}-1.trans.txt").write_text(f"{n % 4}-1-{n:04d} TEXT\n")
    with tarfile.open(tmp_path / "dev.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "tree", arcname="LibriSpeech")
    settings = config(f"{speech},librispeech:{tmp_path}/dev.tar.gz", num_shards=6)

    real, calls = shards.process, []

    def counted(recording, limits):
        calls.append(recording.item.id)
        return real(recording, limits)

    monkeypatch.setattr(shards, "process", counted)
    whole = run(settings, tmp_path / "whole")
    assert len(calls) == 20 and sum(len(whole.split(split)) for split in whole.splits) == 20

    def interrupted(recording, limits):
        if len(calls) == 13:
            raise KeyboardInterrupt
        return counted(recording, limits)

    calls.clear()
    monkeypatch.setattr(shards, "process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "parts")
    kept = len(list((tmp_path / "parts" / "corpus" / "unfinished").glob("*.npz")))
    assert 0 < kept < 8 and not (tmp_path / "parts" / "corpus" / "card.json").exists()
    noise(speech / "s0" / "new.wav", 0.5)  # the plan is kept too

    calls.clear()
    monkeypatch.setattr(shards, "process", counted)
    settings.corpus.num_workers = num_workers
    run(settings, tmp_path / "parts")
    assert len(calls) < 20  # in this process; none with workers
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["listing-000.json", "*.npz"])
def test_damage_before_the_corpus_is_finished_is_noticed(speech, tmp_path, monkeypatch, name):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_finish", killed)
        run(config(speech), tmp_path)
    path = sorted((tmp_path / "corpus" / "unfinished").glob(name))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: damaged.*remove"):
        run(config(speech), tmp_path)


def test_a_killed_rename_is_made_up_for(speech, tmp_path, monkeypatch):
    whole = run(config(speech), tmp_path / "whole")
    real = cards.write

    def killed(path, card):
        if path.parent.name == "corpus":
            raise KeyboardInterrupt
        real(path, card)

    monkeypatch.setattr(cards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config(speech), tmp_path / "parts")
    monkeypatch.setattr(cards, "write", real)
    again = run(config(speech), tmp_path / "parts")
    assert again.card["fingerprint"] == whole.card["fingerprint"]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    left = tmp_path / "parts" / "corpus" / "unfinished"  # killed after the card
    left.mkdir()
    (left / "card.json").write_text("{}")
    run(config(speech), tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole") and not left.exists()


def test_archive_and_tree_are_the_same_corpus(tmp_path):
    for n in range(4):
        noise(tmp_path / "tree" / "dev" / str(n) / "1" / f"{n}-1-0000.flac", 0.4, seed=n)
    with tarfile.open(tmp_path / "dev.tar", "w") as archive:
        archive.add(tmp_path / "tree", arcname="LibriSpeech")
    tree = run(config(f"librispeech:{tmp_path}/tree", num_shards=1), tmp_path / "a")
    packed = run(config(f"librispeech:{tmp_path}/dev.tar", num_shards=1), tmp_path / "b")
    same = [{split: sorted(c.split(split).ids) for split in c.splits} for c in (tree, packed)]
    assert same[0] == same[1] and same[0]["train"][0].startswith("dev/")


def test_unusable_audio_is_listed_and_the_rest_kept(speech, tmp_path, capsys, monkeypatch):
    bad = speech / "s0"
    (bad / "broken.flac").write_bytes(b"not audio" * 100)
    (bad / "empty.wav").touch()
    noise(bad / "nothing.wav", 0.0)
    noise(bad / "short.wav", 0.1)
    noise(bad / "twice.wav", 0.3)
    noise(bad / "twice.flac", 0.3)
    soundfile.write(bad / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(bad / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    noise(bad / "off.wav", 0.3)
    (bad / "off.phn").write_text("0 99999 a\n")
    (speech / "s1" / "gone.wav").symlink_to(tmp_path / "nowhere")
    (speech / "s1" / "loop.wav").symlink_to("loop.wav")
    soundfile.write(bad / "one.wav", np.ones(1), 16_000)
    noise(bad / "cut.wav", 0.5)
    (bad / "cut.wav").write_bytes((bad / "cut.wav").read_bytes()[:9_000])
    noise(bad / "name.wav", 0.5)
    (bad / "name.wav").rename(bad / os.fsdecode(b"caf\xe9.wav"))
    noise(bad / ("y" * 251 + ".wav"), 0.5)  # as long as a name can be: nothing is wrong with it
    message = r"13 of 27 utterances \(48.15%\) .*max_rejected is 0.00%"
    with pytest.raises(ValueError, match=message):
        run(config(speech), tmp_path)
    listed = (tmp_path / "corpus" / "rejected.tsv").read_text().splitlines()
    reasons = dict(line.split("\t") for line in listed[1:])
    assert {id_: reason[:12] for id_, reason in reasons.items()} == {
        "s0/twice": "duplicate: /",
        "s0/broken": "unreadable: ",
        "s0/empty": "empty file",
        "s0/nothing": "empty: no sa",
        "s0/short": "too short: 0",
        "s0/silent": "silent: no s",
        "s0/nan": "samples that",
        "s0/off": "alignment: t",
        "s1/gone": "unreadable: ",
        "s1/loop": "unreadable: ",
        "s0/one": "too short: 0",
        "s0/cut": "ends early: ",
        r"s0/caf\udce9": "file name th",
    }
    monkeypatch.setattr(shards, "process", None)  # nothing is decoded again
    made = run(config(speech, max_rejected=0.49), tmp_path)
    assert sum(len(made.split(split)) for split in made.splits) == 14
    assert made.card["rejected"]["utterances"] == 13
    assert "left out: 13 (" in capsys.readouterr().out


def test_long_recordings_are_cut_with_their_times(tmp_path):
    for speaker in ("a", "b"):
        path = tmp_path / "speech" / speaker / "long.wav"
        noise(path, 2.6, rate=8_000)
        times = range(0, 20_800, 800)  # a phone each 0.1 s, a word each 0.5 s; samples at 8 kHz
        path.with_suffix(".phn").write_text("".join(f"{t} {t + 800} p{t}\n" for t in times))
        words = range(0, 20_000, 4_000)
        path.with_suffix(".wrd").write_text("".join(f"{t} {t + 4000} w{t}\n" for t in words))
        path.with_suffix(".txt").write_text("0 20800 the whole text")
    split = run(config(tmp_path / "speech"), tmp_path).split("train")
    speaker = split.speakers[0]
    assert split.ids == [f"{speaker}/long--{n:04d}" for n in range(len(split))] and len(split) > 2
    assert split.num_samples.sum() == 41_600 and split.num_samples.max() <= 16_000
    start = 0
    for n, num_samples in enumerate(split.num_samples):
        phones, words = split.phones(n), split.words(n)
        assert phones.starts[0] == 0 and phones.stops[-1] == num_samples
        for first, name in zip(phones.starts[1:] + start, phones.names[1:], strict=True):
            assert name == f"p{first // 2}"  # where it was in the whole, at 8 kHz
        assert split.text(n) == " ".join(words.names)
        start += num_samples


def test_short_recordings_keep_their_text(tmp_path):
    for speaker in ("a", "b"):
        noise(tmp_path / "speech" / speaker / "short.wav", 0.5)
        (tmp_path / "speech" / speaker / "short.txt").write_text("0 8000 Say\n it.\n")
    assert run(config(tmp_path / "speech"), tmp_path).split("train").text(0) == "Say it."


def test_manifest_and_test_split(speech, tmp_path):
    lines = [f"s{n % 4}/u{n}.flac\t{8_000 if n else 7_999}" for n in range(4)]
    (tmp_path / "train.tsv").write_text("\n".join([str(speech), *lines]))
    shutil.copytree(speech / "s0", tmp_path / "scored" / "dr1")
    settings = config(
        f"tsv:{tmp_path}/train.tsv", test=str(tmp_path / "scored"), exclude="u8$", max_rejected=0.5
    )
    made = run(settings, tmp_path)
    assert made.splits == ("train", "validation", "test")
    assert made.split("test").ids == ["dr1/u0", "dr1/u4"] and made.card["excluded"] == 1
    reason = (tmp_path / "corpus" / "rejected.tsv").read_text()
    assert "s0/u0\t8000 samples, the manifest says 7999" in reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(train=""), "corpus.train is empty"),
        (dict(min_seconds=0.01), "takes 0.025 s for one frame"),
        (dict(min_seconds=0.5), "a third of max_seconds"),
        (dict(max_rejected=1.5), "are shares"),
        (dict(num_shards=0), "num_shards=0"),
        (dict(exclude="("), "exclude='\\(' is not a regular expression"),
        (dict(speaker_pattern="(s)"), "all training audio is of one speaker, 's'"),
        (dict(exclude="u"), "none of 12 audio files is left"),
        (dict(test="synth"), "synth makes train and validation only"),
        (dict(validation="folder:nowhere"), "nowhere does not exist"),
        (dict(validation="."), "no audio below it"),
    ],
)
def test_impossible_wishes(speech, tmp_path, monkeypatch, fields, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    settings = config(speech)
    settings.corpus.update(fields)
    with pytest.raises((ValueError, OSError), match=message):
        run(settings, tmp_path)


def test_a_split_of_which_nothing_is_left(speech, tmp_path):
    noise(tmp_path / "other" / "x.wav", 0.1)
    with pytest.raises(ValueError, match=r"no utterance is left for validation .too short 1"):
        run(config(speech, validation=str(tmp_path / "other"), max_rejected=1.0), tmp_path)


def test_synth_is_the_same_every_time(tmp_path):
    pytest.importorskip("espeakng_loader")
    settings = config("synth", synth=SYNTH, max_seconds=10.0)
    made = run(settings, tmp_path / "a")
    run(settings, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(set(made.split("train").speakers)) == 2
    for name in made.splits:
        split = made.split(name)
        assert split.ids[0].startswith(f"{name}/")
        assert split.phones(0).stops[-1] == split.num_samples[0] and split.words(0).names
