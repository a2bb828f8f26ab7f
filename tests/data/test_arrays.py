# SPDX-License-Identifier: Apache-2.0
"""The ragged store: what goes in comes out, an interruption loses nothing, damage is noticed."""

import itertools
import pickle  # as a store travels to a reading process

import numpy as np
import pytest

from hubert_jax.data import arrays, cards

IDS = [f"speaker/{name}" for name in "abcdefg"]
LENGTHS = np.array([3, 0, 5, 2, 0, 7, 1])


def rows_of(position: int, width: int | None) -> np.ndarray:
    shape = (LENGTHS[position],) if width is None else (LENGTHS[position], width)
    return (np.arange(np.prod(shape, dtype=int)).reshape(shape) + 100 * position).astype(np.float32)


def write(folder, *, width=None, dtype="float32", num_shards=3, produce=None, **options):
    def backwards(positions):
        yield from ((int(p), rows_of(int(p), width)) for p in positions[::-1])

    arrays.write_store(
        folder,
        ids=options.pop("ids", IDS),
        lengths=LENGTHS,
        width=width,
        dtype=dtype,
        num_shards=num_shards,
        produce=produce or backwards,
        card=options.pop("card", cards.new("features", made_from={"layer": 6})),
        **options,
    )


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("num_shards", [1, 3, 99])
def test_rows_come_back_by_id_and_by_shard(tmp_path, width, num_shards):
    write(tmp_path, width=width, num_shards=num_shards)
    store = pickle.loads(pickle.dumps(arrays.Store(tmp_path)))  # noqa: S301
    for position, id_ in enumerate(IDS):
        np.testing.assert_array_equal(store[id_], rows_of(position, width))
    shards = [store.shard(shard) for shard in range(store.num_shards)]
    every_row = [rows_of(position, width) for position in range(len(IDS))]
    np.testing.assert_array_equal(np.concatenate(shards), np.concatenate(every_row))
    assert [id_ for shard in range(store.num_shards) for id_ in store.shard_ids(shard)] == IDS
    assert store.lengths.tolist() == LENGTHS.tolist() and store.num_rows == LENGTHS.sum()
    assert store.num_shards == min(num_shards, len(IDS))
    assert store.card["num_rows"] == LENGTHS.sum() and store.dtype == np.float32


def test_shards_are_plain_numpy_files_and_the_card_has_their_digests(tmp_path):
    write(tmp_path, width=4, dtype="float16")
    card = cards.read(tmp_path / "card.json")
    names = [f"shard-{shard:05d}-of-00003.npy" for shard in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "index.npz", *names]
    assert card["shards"] == {name: cards.digest(tmp_path / name) for name in names}
    assert np.load(tmp_path / names[0]).dtype == np.float16


def test_shards_have_about_equally_many_rows():
    lengths = np.random.default_rng(0).integers(50, 1500, 1000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bounds = arrays.shard_bounds(offsets, 8)
    rows = np.diff(offsets[bounds])
    assert rows.sum() == lengths.sum() and np.ptp(rows) < 2 * 1500


def test_interrupted_store_goes_on_with_the_missing_shards(tmp_path):
    calls = []

    def fail_in_the_second(positions):
        calls.append(positions.tolist())
        if len(calls) == 2:
            yield int(positions[0]), rows_of(int(positions[0]), None)
            raise KeyboardInterrupt
        yield from ((int(p), rows_of(int(p), None)) for p in positions)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, produce=fail_in_the_second)
    assert len(list(tmp_path.glob("shard-*.npy"))) == 1
    with pytest.raises(FileNotFoundError, match="did not finish"):
        arrays.Store(tmp_path)
    write(tmp_path, produce=fail_in_the_second)
    assert calls[2] == calls[1] and len(calls) == 4  # the whole shard was not asked for again
    store = arrays.Store(tmp_path)
    for position, id_ in enumerate(IDS):
        np.testing.assert_array_equal(store[id_], rows_of(position, None))


@pytest.mark.parametrize(
    "other",
    [
        {"card": cards.new("features", made_from={"layer": 9})},
        {"num_shards": 2},
        {"dtype": "int16"},
    ],
    ids=["made from", "shards", "dtype"],
)
def test_unfinished_store_of_something_else_is_not_gone_on_with(tmp_path, other):
    def interrupted(positions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, produce=interrupted)
    with pytest.raises(ValueError, match=r"unfinished\.json: made_from.*remove"):
        write(tmp_path, **other)


def test_processes_share_the_shards_and_the_first_writes_the_card(tmp_path):
    asked = []

    def produce(positions):
        asked.append(positions.tolist())
        yield from ((int(p), rows_of(int(p), None)) for p in positions)

    def second_process():
        """Runs at the first process's barriers: between the start and the end of the shards."""
        if not barriers:
            write(tmp_path, produce=produce, process=(1, 2))
            assert not (tmp_path / "card.json").exists()
        barriers.append(len(asked))

    barriers: list[int] = []
    write(tmp_path, produce=produce, process=(0, 2), barrier=second_process)
    assert barriers == [1, 3, 3] and sorted(itertools.chain(*asked)) == list(range(len(IDS)))
    assert arrays.Store(tmp_path).num_rows == LENGTHS.sum()


def test_results_see_the_whole_store_and_land_in_the_card(tmp_path):
    write(tmp_path, results=lambda store: {"sum": float(store.shard(1).sum())})
    store = arrays.Store(tmp_path)
    assert store.card["sum"] == float(store.shard(1).sum())


@pytest.mark.parametrize(
    ("produce", "message"),
    [
        (lambda positions: iter([]), "of . utterances were not produced, the first is 0"),
        (lambda positions: [(0, rows_of(0, None))] * 2, "utterance 0 produced twice"),
        (lambda positions: [(0, rows_of(2, None))], r"gave \(5,\) rows, planned \(3,\)"),
        (lambda positions: [(0, np.full(3, np.nan))], "not finite in float32"),
        (lambda positions: [(0, np.full(3, 1e30))], "not finite in float16"),
    ],
    ids=["none", "twice", "length", "nan", "too large"],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_wrong_rows_are_refused_and_leave_no_shard(tmp_path, produce, message):
    dtype = "float16" if "float16" in message else "float32"
    with pytest.raises(ValueError, match=message):
        write(tmp_path, produce=produce, dtype=dtype)
    assert not list(tmp_path.glob("*shard-*"))


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 utterance ids occur twice"):
        write(tmp_path, ids=IDS[:-1] + IDS[:1])
    with pytest.raises(ValueError, match="2 ids for 7 lengths"):
        write(tmp_path, ids=IDS[:2])
    with pytest.raises(ValueError, match="no utterances"):
        write(tmp_path, ids=[])


def test_damaged_shards_are_noticed_on_opening(tmp_path):
    write(tmp_path)
    path = tmp_path / "shard-00001-of-00003.npy"
    with pytest.raises(KeyError, match="no utterance 'x' among 7"):
        arrays.Store(tmp_path)["x"]
    np.save(path, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"holds \(3,\) float32, the index says"):
        arrays.Store(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="missing or broken"):
        arrays.Store(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="missing or broken"):
        arrays.Store(tmp_path)


def test_damage_before_the_store_is_finished_is_noticed(tmp_path):
    def fail_in_the_second(positions):
        if 0 not in positions:
            raise KeyboardInterrupt
        yield from ((int(p), rows_of(int(p), None)) for p in positions)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, produce=fail_in_the_second)
    path = tmp_path / "shard-00000-of-00003.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    write(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00000-of-00003\.npy: is not what its card says"):
        arrays.Store(tmp_path).check()
    path.unlink()
    (tmp_path / "card.json").unlink()
    write(tmp_path)
    arrays.Store(tmp_path).check()


def test_shards_whose_digest_was_not_kept_are_sealed_as_they_are(tmp_path):
    """An unfinished store of 0.2.0."""
    write(tmp_path)
    wanted = (tmp_path / "card.json").read_text()
    (tmp_path / "card.json").unlink()
    write(tmp_path, produce=lambda positions: pytest.fail("made again"))
    assert (tmp_path / "card.json").read_text() == wanted


def test_a_kill_right_after_the_card_leaves_no_plan(tmp_path):
    write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / arrays.PLAN).write_text("{}")
    (tmp_path / "shard-00000-of-00003.json").write_text("{}")
    assert arrays.is_made(tmp_path, {"layer": 6})
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (tmp_path / "card.json").unlink()
    (tmp_path / arrays.PLAN).write_text("{}")
    assert not arrays.is_made(tmp_path, {"layer": 6})
    assert (tmp_path / arrays.PLAN).exists()  # it says what the shards are of
