# SPDX-License-Identifier: Apache-2.0
"""fairseq's files: read as they are written, refused by line and number, never unpickled."""

import os
import pathlib
import subprocess
import sys

import joblib
import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans

from hubert_jax.data import fairseq_files
from hubert_jax.data.fairseq_files import LabelFile, Manifest, Row, Stretch
from hubert_jax.data.utterance import cut_from, piece_id
from hubert_jax.ops import frames

KM = b"3 0 1\n\n2 2\n"


def label_file(folder, text=KM, *, num_lines=3, num_codes=4) -> LabelFile:
    (folder / "train.km").write_bytes(text)
    return LabelFile(folder / "train.km", num_lines=num_lines, num_codes=num_codes)


def test_manifest_is_read_as_it_was_written(tmp_path):
    manifest = Manifest("/data/LibriSpeech", [Row("b/2.flac", 1600), Row("a/1 x.wav", 0)])
    path = tmp_path / "train.tsv"
    fairseq_files.write_manifest(path, manifest)
    assert path.read_bytes() == b"/data/LibriSpeech\nb/2.flac\t1600\na/1 x.wav\t0\n"
    assert fairseq_files.read_manifest(path) == manifest


def test_labels_are_read_line_by_line_and_written_back(tmp_path):
    labels = label_file(tmp_path)
    assert labels.lengths == [3, 0, 2]
    lines = [labels.read(Stretch("x", n, 0, labels.lengths[n])) for n in range(3)]
    assert [line.tolist() for line in lines] == [[3, 0, 1], [], [2, 2]]
    assert labels.read(Stretch("x", 0, 1, 2)).tolist() == [0, 1]
    fairseq_files.write_labels(tmp_path / "valid.km", lines)
    assert (tmp_path / "valid.km").read_bytes() == KM


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"3 0 1\n2 2\n", r"train\.km: 2 lines of labels for 3 in train\.tsv;.*all put together"),
        (KM + b"1\n", r"train\.km: 4 lines of labels for 3 in train\.tsv"),
        (b"3 0 1\n\n2 2.5\n", r"train\.km, line 3: not whole numbers.*'2\.5'"),
        (b"3 0 1\n\n2 " + b"9" * 30 + b"\n", r"train\.km, line 3: not whole numbers"),
        (b"3 0 1\n-1 2\n\n", r"line 2: labels from -1 to 2, but there are 4 codes, 0 to 3"),
        (b"3 4 1\n\n\n", r"line 1: labels from 1 to 4, but there are 4 codes.*kmeans\.num_codes"),
    ],
)
def test_labels_that_are_none_are_refused_by_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        label_file(tmp_path, text)


def test_dictionary(tmp_path):
    path = tmp_path / "dict.km.txt"
    fairseq_files.write_dictionary(path, 3)
    assert path.read_text() == "0 1\n1 1\n2 1\n"
    assert fairseq_files.read_dictionary(path) == 3
    path.write_text("2 90\n0 17\n1 4\n")  # fairseq-preprocess sorts by frequency
    assert fairseq_files.read_dictionary(path) == 3
    for text, wrong in (("0 1\n2 1\n", "'1', '2'"), ("0 1\n0 1\n", "'1'"), ("", "")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"dict\.km\.txt: {len(text) // 4} lines.*{wrong}"):
            fairseq_files.read_dictionary(path)


# Which labels are whose.


def match(folder, corpus: dict[str, int], rows: list[Row], counts: list[int], *, rate=50):
    """Lines of labels 0, 1, 2, ... matched with the utterances of `corpus`, their samples by id."""
    text = "".join(" ".join(map(str, range(count))) + "\n" for count in counts).encode()
    labels = label_file(folder, text, num_lines=len(rows), num_codes=max(counts))
    found = fairseq_files.match(list(corpus), list(corpus.values()), rows, labels, rate=rate)
    return {stretch.id: labels.read(stretch).tolist() for stretch in found}


@pytest.mark.parametrize("rate", [50, 100])
def test_utterances_find_their_lines_in_the_manifests_order(tmp_path, rate):
    corpus = {"a/1": 1600, "a/2": 399, "b/1": 2000}
    counts = [frames.num_frames(n, hop=16_000 // rate) for n in (2000, 800, 1600, 399)]
    rows = [Row("b/1.wav", 2000), Row("rejected.wav", 800), Row("a/1.flac", 1600), Row("a/2", 399)]
    found = match(tmp_path, corpus, rows, counts, rate=rate)
    assert list(found) == ["b/1", "a/1", "a/2"]
    assert [len(labels) for labels in found.values()] == [counts[0], counts[2], 0]


def test_wrong_numbers_and_missing_utterances_are_refused(tmp_path):
    rows = [Row("a.wav", 1600)]
    with pytest.raises(
        ValueError,
        match=r"line 1: utterance 'a' has 8 labels, its 1600 samples at 50 labels per second have"
        r" 4; made at another rate \(--rate=50 or 100\)",
    ):
        match(tmp_path, {"a": 1600}, rows, [8])
    with pytest.raises(
        ValueError, match=r"no labels for 1 of 2 utterances, 'b' for one; the manifest has 'a'\."
    ):
        match(tmp_path, {"a": 1600, "b": 1600}, rows, [4])
    with pytest.raises(ValueError, match=r"utterance 'a' is in lines 1 and 2.*leave one of them"):
        match(tmp_path, {"a": 1600}, [*rows, Row("a.flac", 1600)], [4, 4])


@pytest.mark.parametrize("rate", [50, 100])
def test_pieces_take_the_labels_nearest_in_time(tmp_path, rate):
    hop = 16_000 // rate
    lengths = [5_013, 7_120, 4_000]
    corpus = {piece_id("long", n): length for n, length in enumerate(lengths)}
    assert cut_from("long--0001") == "long" and cut_from("a-0001") is None
    whole = frames.num_frames(sum(lengths), hop=hop)
    found = match(tmp_path, corpus, [Row("long.wav", sum(lengths))], [whole], rate=rate)
    start = 0
    for length, labels in zip(lengths, found.values(), strict=True):
        assert len(labels) == frames.num_frames(length, hop=hop)
        # Label n is of the samples from n * hop on.
        distances = np.array(labels) * hop - (start + np.arange(len(labels)) * hop)
        at_the_end = start + length == sum(lengths)
        assert (np.abs(distances) <= (hop if at_the_end else hop / 2)).all()
        start += length
    del corpus["long--0001"]  # silence that was left out: where the last one begins is not known
    with pytest.raises(
        ValueError,
        match=r"'long' has 16133 samples in the manifest, but its 2 pieces in the corpus have 9013"
        r".*larger corpus\.max_seconds",
    ):
        match(tmp_path, corpus, [Row("long.wav", sum(lengths))], [whole], rate=rate)


# Centres.

CENTERS_CD = np.random.default_rng(0).normal(size=(5, 3))


def test_centres_of_every_form_are_read_as_float32(tmp_path):
    fairseq_files.write_centers(tmp_path / "km.npy", CENTERS_CD)
    np.save(tmp_path / "float64.npy", CENTERS_CD)
    np.savez(tmp_path / "ours.npz", centers_CD=CENTERS_CD, counts=np.ones((5, 1)))
    np.savez(tmp_path / "sklearn.npz", cluster_centers_=CENTERS_CD, inertia_=np.float64(1))
    np.savez(tmp_path / "alone.npz", c=CENTERS_CD, labels=np.ones(9))
    for path in sorted(tmp_path.iterdir()):
        read = fairseq_files.read_centers(path)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, CENTERS_CD.astype(np.float32))
    assert np.load(tmp_path / "km.npy").dtype == np.float32


def test_arrays_that_are_no_centres_are_refused(tmp_path):
    nan = CENTERS_CD.copy()
    nan[3, 1] = np.nan
    for array, message in (
        (nan, r"1 of 5 centres are not finite in float32, code 3 for one; fit the k-means again"),
        (CENTERS_CD * 1e60, r"5 of 5 centres are not finite in float32"),
        (CENTERS_CD[0], r"float64 of shape \(3,\); centres are floats, a row for each code"),
        (np.ones((5, 3), int), r"int64 of shape \(5, 3\)"),
    ):
        np.save(tmp_path / "x.npy", array)
        with (
            np.errstate(over="ignore"),
            pytest.raises(ValueError, match=r"x\.npy: " + message),
        ):
            fairseq_files.read_centers(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", a=CENTERS_CD, b=CENTERS_CD)
    with pytest.raises(ValueError, match=r"which array.*a \(5, 3\), b \(5, 3\).*cluster_centers_"):
        fairseq_files.read_centers(tmp_path / "x.npz")
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
        with pytest.raises(ValueError, match=r"x\.np[yz]: broken"):
            fairseq_files.read_centers(tmp_path / name)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("name", "compress"), [("km.bin", 0), ("my 'km'.joblib", 3)])
def test_joblib_is_refused_with_the_command_that_converts_it(tmp_path, name, compress):
    fitted = MiniBatchKMeans(4, n_init=1, random_state=0).fit(
        np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    )
    path = tmp_path / name
    joblib.dump(fitted, path, compress=compress)
    with pytest.raises(ValueError, match="runs code when it is opened") as caught:
        fairseq_files.read_centers(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(str(path.with_suffix(".npy")))
    command = message[message.index("python -c ") : message.rindex("\nthen give")]
    assert command.count("\n") == 1
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    np.testing.assert_array_equal(
        fairseq_files.read_centers(path.with_suffix(".npy")), fitted.cluster_centers_
    )


def test_nothing_is_unpickled_whatever_the_file_is_called(tmp_path):
    trap = tmp_path / "sprung"
    bomb = np.array([Bomb(trap)], dtype=object)
    np.save(tmp_path / "km.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "km.npz", cluster_centers_=bomb, allow_pickle=True)
    joblib.dump(Bomb(trap), tmp_path / "joblib.npy")
    joblib.dump(Bomb(trap), tmp_path / "km.km")
    for path in list(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=r"joblib\.load"):
            fairseq_files.read_centers(path)
    assert not trap.exists()
