# SPDX-License-Identifier: Apache-2.0
"""Splits and shards, before anything is decoded."""

import pytest

from hubert_jax.data import plan as planning
from hubert_jax.data.readers import Item, Listing, Source

FOLDER, OTHER = Source("folder", "a"), Source("folder", "b")
ARCHIVE = Source("librispeech", "c.tar.gz")
SYNTH = Source("synth", "")


def items(source, num_speakers, num_each, *, num_bytes=100):
    name = source.path
    return [
        Item(f"{name}/{s}/{n}", f"{name}/{s}/{n}.wav", num_bytes, f"{name}{s}", "", (), -1)
        for s in range(num_speakers)
        for n in range(num_each)
    ]


def listing(source, num_speakers=10, num_each=4, **options):
    return {source: Listing(items(source, num_speakers, num_each, **options), 0.1)}


def plan(listings, *, exclude="", validation_share=0.2, num_shards=8, seed=0):
    return planning.plan(
        listings,
        exclude=exclude,
        validation_share=validation_share,
        num_shards=num_shards,
        seed=seed,
    )


def by_split(made):
    splits = {}
    for task in made.tasks:
        for shard in task.shards:
            splits.setdefault(shard.split, []).extend(shard.items)
    return splits


def test_speakers_are_on_one_side_and_drawn_by_the_seed():
    listings = {"train": listing(FOLDER) | listing(OTHER)}
    splits = by_split(plan(listings))
    train, validation = ({item.speaker for item in splits[s]} for s in ("train", "validation"))
    assert not train & validation and len(validation) == 4 and len(train) == 16
    assert sorted(splits["train"] + splits["validation"]) == sorted(
        item for found in listings["train"].values() for item in found.items
    )
    assert plan(listings) == plan(listings)
    assert {item.speaker for item in by_split(plan(listings, seed=1))["validation"]} != validation


def test_validation_of_its_own_takes_no_speaker_from_train():
    splits = by_split(plan({"train": listing(FOLDER), "validation": listing(OTHER, 2)}))
    assert (len(splits["train"]), len(splits["validation"])) == (40, 8)


@pytest.mark.parametrize(("num_speakers", "share", "num_drawn"), [(2, 0.01, 1), (2, 0.99, 1)])
def test_both_sides_have_a_speaker(num_speakers, share, num_drawn):
    splits = by_split(plan({"train": listing(FOLDER, num_speakers)}, validation_share=share))
    assert len({item.speaker for item in splits["validation"]}) == num_drawn


def test_one_speaker_cannot_be_split():
    with pytest.raises(ValueError, match=r"of one speaker, 'a0': .*speaker_pattern"):
        plan({"train": listing(FOLDER, 1)})


def test_shards_are_runs_of_about_equal_bytes():
    listings = {"train": listing(FOLDER, 80, 10), "validation": listing(OTHER, 10, 10)}
    shards = [shard for task in plan(listings).tasks for shard in task.shards]
    assert [shard.name for shard in shards] == [f"train-{n:05d}" for n in range(8)] + [
        "validation-00000"
    ]
    assert [len(shard.items) for shard in shards] == [100] * 9
    assert [item for shard in shards[:8] for item in shard.items] == items(FOLDER, 80, 10)


def test_no_shard_is_empty():
    large = {FOLDER: Listing(items(FOLDER, 2, 2)[:3] + items(OTHER, 1, 1, num_bytes=10**6), 0.1)}
    made = plan({"train": large, "validation": listing(ARCHIVE)}, num_shards=16)
    assert all(shard.items for task in made.tasks for shard in task.shards)
    nothing = {FOLDER: Listing(items(FOLDER, 2, 2, num_bytes=0), 0.1)}  # files that are gone
    assert len(by_split(plan({"train": nothing}))["train"]) == 2


def test_an_archive_is_one_task_of_both_splits():
    made = plan({"train": listing(FOLDER) | listing(ARCHIVE)})
    (task,) = [task for task in made.tasks if task.source == ARCHIVE]
    assert {shard.split for shard in task.shards} == {"train", "validation"}
    assert all(len(task.shards) == 1 for task in made.tasks if task.source == FOLDER)


def test_synth_has_its_own_validation():
    made = plan({"train": {SYNTH: Listing([], 0.0)}})
    assert [shard.name for task in made.tasks for shard in task.shards] == [
        "train-00000",
        "validation-00000",
    ]
    both = plan({"train": {SYNTH: Listing([], 0.0)} | listing(FOLDER)})
    assert len(by_split(both)["validation"]) == 8
    only_train = plan({"train": {SYNTH: Listing([], 0.0)}, "validation": listing(FOLDER)})
    (task,) = [task for task in only_train.tasks if task.source == SYNTH]
    assert [shard.split for shard in task.shards] == ["train"]


def test_excluded_ids_are_counted():
    made = plan({"train": listing(FOLDER)}, exclude=r"/[01]$")
    assert made.num_excluded == 20
    assert all(item.id[-1] in "23" for items in by_split(made).values() for item in items)
    with pytest.raises(ValueError, match=r"folder:a: none of 40 .* corpus.exclude='a/'"):
        plan({"train": listing(FOLDER)}, exclude="a/")


def test_equal_ids():
    first, *rest = items(FOLDER, 2, 2)
    twin = first._replace(path="a/0/0.flac")
    made = plan({"train": {FOLDER: Listing([first, twin, *rest], 0.1)}})
    assert made.rejected == [("a/0/0", "duplicate: a/0/0.wav has the same id as a/0/0.flac")]
    same = {OTHER: Listing(items(FOLDER, 2, 2), 0.1)}
    for listings in (
        {"train": listing(FOLDER, 2, 2) | same},
        {"train": listing(FOLDER, 2, 2), "validation": same},
        {"train": listing(FOLDER, 2, 2), "validation": listing(FOLDER, 2, 2)},
    ):
        with pytest.raises(ValueError, match=r"'a/0/0' is in folder:a .* and in folder"):
            plan(listings)


def test_names_that_are_not_text_are_rejected():
    strange = items(FOLDER, 2, 1)[0]._replace(id="a/caf\udce9")
    made = plan({"train": {FOLDER: Listing([strange, *items(FOLDER, 2, 2)], 0.1)}})
    assert made.rejected == [("a/caf\udce9", "file name that is not UTF-8")]
