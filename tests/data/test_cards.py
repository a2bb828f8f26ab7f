# SPDX-License-Identifier: Apache-2.0
"""Cards: what they accept and refuse, and that nothing half-written ever has its final name."""

import errno
import hashlib

import numpy as np
import pytest

from hubert_jax.data import cards

MADE_FROM = {"kmeans": {"num_codes": 100, "seed": 0}, "corpus": "sha256:ab", "rungs": (1, 2)}


def test_card_survives_the_disk(tmp_path):
    made_from = {"count": np.int64(3), "share": np.float32(0.5), "path": tmp_path, "shape": (2, 3)}
    cards.write(tmp_path / "card.json", cards.new("labels", made_from=made_from, rate=50))
    card = cards.read(tmp_path / "card.json")
    assert card["kind"] == "labels" and card["rate"] == 50
    assert set(card["versions"]) == {"hubert_jax", "jax", "numpy"}
    assert cards.is_made(tmp_path / "card.json", made_from)  # tuples and numpy scalars are the same
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_missing_card_is_unfinished_and_cannot_be_read(tmp_path):
    assert not cards.is_made(tmp_path / "card.json", MADE_FROM)
    with pytest.raises(FileNotFoundError, match="has not run, or did not finish"):
        cards.read(tmp_path / "card.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kmeans": {"num_codes": 500, "seed": 0}}, r"made_from\.kmeans\.num_codes is 100.*500"),
        ({"corpus": "sha256:cd"}, r"made_from\.corpus is 'sha256:ab'.*'sha256:cd'"),
        ({"rungs": (1, 3)}, r"made_from\.rungs is \[1, 2\].*\[1, 3\]"),
        ({"new": 1}, r"made_from\.new is '\(absent\)'.*1"),
    ],
)
def test_other_inputs_are_refused_by_field(tmp_path, changed, message):
    cards.write(tmp_path / "card.json", cards.new("codebook", made_from=MADE_FROM))
    with pytest.raises(ValueError, match=message) as error:
        cards.is_made(tmp_path / "card.json", MADE_FROM | changed)
    assert f"remove {tmp_path} or choose another --workdir" in str(error.value)


def test_require_names_path_field_and_remedy(tmp_path):
    path = tmp_path / "codebook.json"
    card = cards.new("codebook", made_from=MADE_FROM, source={"kind": "layer", "layer": 6})
    cards.require(path, card, kind="codebook", source={"kind": "layer", "layer": 6})
    cards.require(path, card, made_from__kmeans__num_codes=100, made_from__rungs=(1, 2))
    with pytest.raises(ValueError, match=r"codebook\.json: source\.layer is 6, expected 9"):
        cards.require(path, card, source={"kind": "layer", "layer": 9})
    with pytest.raises(ValueError, match=r"made_from\.rate is '\(absent\)', expected 50"):
        cards.require(path, card, made_from__rate=50)
    with pytest.raises(ValueError, match=r"remove .*codebook\.\* and run"):
        cards.require(path, card, kind="labels")


def test_whole_files_appear_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "array.npy"
    with cards.whole(path) as unfinished:
        unfinished.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(KeyError), cards.whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert path.read_text() == "new"
    assert [each.name for each in path.parent.iterdir()] == ["array.npy"]


def test_whole_folders_and_what_a_killed_run_left(tmp_path):
    path = tmp_path / "folder"
    (tmp_path / ".unfinished-folder").mkdir()
    (tmp_path / ".unfinished-folder" / "old").write_text("left by a killed run")
    with cards.whole(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "new").write_text("")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
    assert [each.name for each in path.iterdir()] == ["new"]


def test_full_disk_names_the_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")
    message = r"no space left writing .*card\.json; free some"
    with pytest.raises(OSError, match=message) as error, cards.whole(path) as unfinished:
        unfinished.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
    assert path.read_text() == "old"


def test_broken_card_names_its_folder(tmp_path):
    (tmp_path / "card.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match=f"not a card.*remove {tmp_path}"):
        cards.read(tmp_path / "card.json")


def test_digest_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"speech")
    assert cards.digest(tmp_path / "file") == "sha256:" + hashlib.sha256(b"speech").hexdigest()


def test_a_card_of_a_later_format_is_refused_with_the_version_that_wrote_it(tmp_path):
    path = tmp_path / "card.json"
    card = cards.new("labels", made_from=MADE_FROM)
    cards.write(path, {name: value for name, value in card.items() if name != "format"})
    assert cards.is_made(path, MADE_FROM)  # 0.2.0 wrote none
    cards.write(path, card | {"format": 2, "versions": {"hubert_jax": "7.0"}})
    with pytest.raises(ValueError, match=r"card\.json: format is 2, written by hubert_jax 7\.0;"):
        cards.is_made(path, MADE_FROM)


def test_a_name_as_long_as_the_disk_allows_can_be_written(tmp_path):
    path = tmp_path / ("a" * 251 + ".npy")
    for text in ("old", "new"):
        with cards.whole(path) as unfinished:
            unfinished.write_text(text)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
