# SPDX-License-Identifier: Apache-2.0
"""Folders, LibriSpeech and manifests, whole and broken."""

import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
import soundfile

from hubert_jax.data import archives, readers
from hubert_jax.data.readers import Source


def write(path, *, seconds=0.1, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate))
    soundfile.write(path, noise, rate)


def listed(source, *, speaker_pattern=""):
    return readers.listing(source, speaker_pattern=speaker_pattern).items


def librispeech(root):
    """Two speakers, three chapters, as the official archives lay them out."""
    for speaker, chapter, texts in ((19, 198, ["A B", "C"]), (19, 227, ["D"]), (26, 495, ["E F"])):
        folder = root / "LibriSpeech" / "dev-clean" / str(speaker) / str(chapter)
        lines = []
        for n, text in enumerate(texts):
            write(folder / f"{speaker}-{chapter}-{n:04d}.flac")
            lines.append(f"{speaker}-{chapter}-{n:04d} {text}\n")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    (root / "LibriSpeech" / "SPEAKERS.TXT").write_text("; not audio\n")
    return root / "LibriSpeech"


def pack(tree, path):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        archive.add(tree, arcname="LibriSpeech")
    return Source("librispeech", str(path))


def test_sources_of_a_field(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "one.tar.gz").touch()
    (tmp_path / "b" / "two.tar").touch()
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert readers.parse(f"{a}, folder:{b},synth") == [
        Source("folder", a),
        Source("folder", b),
        Source("synth", ""),
    ]
    found = readers.parse(f"librispeech:{b},librispeech:{a}")
    assert [source.path for source in found] == [f"{b}/one.tar.gz", f"{b}/two.tar", a]
    assert [source.is_archive for source in found] == [True, True, False]
    assert readers.parse("") == []
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; .* folder, librispeech"):
        readers.parse(f"{a},{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="synth takes no path"):
        readers.parse("synth:somewhere")


def test_folder_is_read_in_depth(tmp_path):
    write(tmp_path / "tom" / "x" / "2.WAV")
    write(tmp_path / "ann" / "1.flac")
    write(tmp_path / "ann" / "10.ogg", rate=8_000)
    write(tmp_path / "19-198-0001.mp3", rate=22_050)
    write(tmp_path / ".hidden" / "3.wav")
    write(tmp_path / "elsewhere" / "far" / "4.wav")
    (tmp_path / "loop").symlink_to(tmp_path)
    for name in ("1.txt", "1.TextGrid", "1.words.ctm", "10.phn", "readme.txt"):
        (tmp_path / "ann" / name).write_text(name)
    items = listed(Source("folder", str(tmp_path)))
    assert [(item.id, item.speaker) for item in items] == [
        ("19-198-0001", "19"),
        ("ann/1", "ann"),
        ("ann/10", "ann"),
        ("elsewhere/far/4", "elsewhere"),
        ("tom/x/2", "tom"),
    ]
    assert all(os.stat(item.path).st_size == item.num_bytes for item in items)
    beside = {r.item.id: r.beside() for r in readers.recordings(Source("folder", ""), items)}
    assert beside["ann/1"] == {
        ".txt": b"1.txt",
        ".textgrid": b"1.TextGrid",
        ".words.ctm": b"1.words.ctm",
    }
    assert beside["ann/10"] == {".phn": b"10.phn"} and beside["tom/x/2"] == {}


def test_the_seconds_of_a_folder_are_about_right(tmp_path):
    for n in range(70):
        write(tmp_path / f"{n}.wav", seconds=0.1 + n / 100)
    items, ratio = readers.listing(Source("folder", str(tmp_path)), speaker_pattern="")
    total = sum(item.num_bytes for item in items) * ratio
    assert total == pytest.approx(sum(0.1 + n / 100 for n in range(70)), rel=0.01)


@pytest.mark.parametrize(
    ("id_", "pattern", "speaker"),
    [
        ("dev-clean/19/198/19-198-0001", "", "19"),
        ("ann/deep/1", "", "ann"),
        ("p225-001", "", "p225"),
        ("recording7", "", "recording7"),
        ("7_jackson_3", r"^\d+_([a-z]+)_", "jackson"),
        ("TRAIN/DR4/FALR0/SX65", r"DR\d/(\w+)/", "FALR0"),
    ],
)
def test_speakers(id_, pattern, speaker):
    assert readers.speaker_of(id_, pattern) == speaker


def test_a_speaker_pattern_that_finds_none():
    for pattern in ("x(y)", "rec", "rec(z?)"):
        with pytest.raises(ValueError, match="finds no speaker in the id 'recording7'"):
            readers.speaker_of("recording7", pattern)


def test_empty_folders_say_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no audio .* looked for .*\.flac.*found no file"):
        listed(Source("folder", str(tmp_path)))
    (tmp_path / "film.m4a").touch()
    with pytest.raises(ValueError, match=r"found \.m4a"):
        listed(Source("folder", str(tmp_path)))
    with pytest.raises(ValueError, match="is it LibriSpeech"):
        listed(Source("librispeech", str(tmp_path)))
    with pytest.raises(NotADirectoryError):
        listed(Source("folder", str(tmp_path / "film.m4a")))


@pytest.mark.parametrize("name", ["dev-clean.tar.gz", "dev-clean.tar"])
def test_librispeech_tree_and_archive_are_the_same(tmp_path, name):
    tree = librispeech(tmp_path)
    archive = pack(tree, tmp_path / name)
    from_tree, from_archive = listed(Source("librispeech", str(tree))), listed(archive)
    assert [(item.id, item.speaker, item.text) for item in from_tree] == [
        ("dev-clean/19/198/19-198-0000", "19", "A B"),
        ("dev-clean/19/198/19-198-0001", "19", "C"),
        ("dev-clean/19/227/19-227-0000", "19", "D"),
        ("dev-clean/26/495/26-495-0000", "26", "E F"),
    ]
    forget = dict(path="", beside=())
    assert sorted(i._replace(**forget) for i in from_archive) == [
        i._replace(**forget) for i in from_tree
    ]
    some = from_archive[1:3]
    for recording in readers.recordings(archive, some):
        (twin,) = [item for item in from_tree if item.id == recording.item.id]
        assert recording.open().read() == pathlib.Path(twin.path).read_bytes()
        some.remove(recording.item)
    assert not some


def test_an_archive_reports_all_its_bytes(tmp_path):
    archive = pack(librispeech(tmp_path), tmp_path / "a.tar.gz")
    reported = []
    readers.listing(archive, speaker_pattern="", report=reported.append)
    size = os.stat(archive.path).st_size
    assert 0.9 * size < sum(reported) <= size


@pytest.mark.parametrize("name", ["../19-198-0000.flac", "/etc/19-198-0000.flac", "a/../../b.txt"])
def test_archives_that_reach_outside_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=r"a\.tar\.gz.*leads out of the archive"):
        listed(Source("librispeech", str(tmp_path / "a.tar.gz")))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_archives_are_not_followed(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("19-198-0000.flac")
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
    assert list(archives.members(str(tmp_path / "a.tar"), lambda name: True)) == []


def test_archives_that_are_not_whole_are_noticed(tmp_path):
    archive = pack(librispeech(tmp_path), tmp_path / "a.tar.gz")
    contents = (tmp_path / "a.tar.gz").read_bytes()
    assert len(listed(archive)) == 4
    damaged = bytearray(contents)
    damaged[len(contents) // 2] ^= 0xFF
    not_whole = [contents[: len(contents) * n // 8] for n in range(1, 8)]
    for broken in [*not_whole, contents[:-4], bytes(damaged), b"no archive" * 99]:
        (tmp_path / "a.tar.gz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken after \d+ of \d+ bytes .*download it again"):
            listed(archive)


def test_manifest(tmp_path):
    for name in ("19/198/19-198-0000.flac", "ann/1.wav", "b.wav"):
        write(tmp_path / "root" / name)
    manifest = tmp_path / "train.tsv"
    body = "19/198/19-198-0000.flac\t1600\nann/1.wav\t1600\n\nb.wav\t7\nann/gone.wav\t5\n"
    for root in (f"{tmp_path}/root", "root"):  # absolute as fairseq writes it, or beside the .tsv
        manifest.write_text(f"{root}\n{body}")
        items = listed(Source("tsv", str(manifest)))
        assert [(item.id, item.speaker, item.num_samples) for item in items] == [
            ("19/198/19-198-0000", "19", 1600),
            ("ann/1", "ann", 1600),
            ("ann/gone", "ann", 5),
            ("b", "b", 7),
        ]
        assert [os.path.exists(item.path) for item in items] == [True, True, False, True]


def test_a_wider_root_allows_what_a_narrower_one_refuses(tmp_path):
    manifest = tmp_path / "a" / "train.tsv"
    manifest.parent.mkdir()
    manifest.write_text(".\n../b/x.wav\t5\n")
    with pytest.raises(ValueError, match="to allow it, name in line 1"):
        listed(Source("tsv", str(manifest)))
    manifest.write_text("..\nb/x.wav\t5\n")
    (item,) = listed(Source("tsv", str(manifest)))
    assert os.path.realpath(item.path) == os.path.realpath(tmp_path / "b" / "x.wav")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/root\n../x.wav\t5\n", "line 2: '../x.wav' leads out of /root"),
        ("/root\na/../../x.wav\t5\n", "leads out of"),
        ("/root\n/etc/x.wav\t5\n", "leads out of"),
        ("/root\na.wav\nb.wav\t5\n", "line 2: 'a.wav' is not 'path<TAB>number of samples'"),
        ("/root\na.wav\tfive\n", "line 2"),
        ("a.wav\t5\n", "first line"),
        ("", "first line"),
        ("/root\n", "no audio"),
    ],
)
def test_manifests_that_are_none(tmp_path, text, message):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        listed(Source("tsv", str(tmp_path / "train.tsv")))
