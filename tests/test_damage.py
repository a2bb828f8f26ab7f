# SPDX-License-Identifier: Apache-2.0
"""One byte flipped in anything on disk is an error that names the file, never another result."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from hubert_jax import checkpoints, optim, train, weights
from hubert_jax.data import arrays, codebooks
from hubert_jax.data.corpus import Corpus
from hubert_jax.stages import prepare
from tests import tiny
from tests.fuzz import readers
from tests.stages import doctor_project as made
from tests.test_sharding import OPTIM


def flip(path: pathlib.Path, place: float) -> bytes:
    """Flips a bit of one byte; returns the file as it was."""
    before = path.read_bytes()
    data = bytearray(before)
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)
    return before


PLACES = (0.02, 0.3, 0.5, 0.77, 0.95)


@pytest.mark.parametrize("name", ["shard-00000-of-00002.npy", "shard-00001-of-00002.npy"])
def test_a_store(tmp_path, name):
    readers.made_folder(tmp_path)
    arrays.Store(tmp_path / "store").check()
    for place in PLACES:
        before = flip(tmp_path / "store" / name, place)
        with pytest.raises(ValueError, match=name):
            arrays.Store(tmp_path / "store").check()
        (tmp_path / "store" / name).write_bytes(before)


def test_a_codebook(tmp_path):
    readers.made_folder(tmp_path)
    path = epath.Path(tmp_path / "codebook" / "codebook.npz")
    codebooks.read_card(path)
    for place in PLACES:
        before = flip(pathlib.Path(path), place)
        with pytest.raises(ValueError, match=r"codebook\.npz: is not the codebook of"):
            codebooks.read_card(path)
        pathlib.Path(path).write_bytes(before)


@pytest.mark.parametrize("by", ["cluster", "import"])
def test_a_codebook_whose_card_says_another_layer(tmp_path, by):
    path, source = epath.Path(tmp_path / "codebook.npz"), {"kind": "layer", "layer": 6}
    made_from = {"features": {"source": source}} if by == "cluster" else {"source": source}
    centers_CD = np.ones((2, 3), np.float32)
    codebooks.write(path, centers_CD, made_from=made_from, source=source, rate=50, arrays={})
    card = codebooks.read_card(path)
    edited = json.dumps(card | {"source": source | {"layer": 5}})
    path.with_suffix(".json").write_text(edited)
    with pytest.raises(ValueError, match=r"codebook\.json: source\.layer is 5, expected 6"):
        codebooks.read_card(path)


def test_a_corpus(tmp_path):
    """A flip is an error, but among the zeros that fill the file up: there it changes nothing."""
    made.write_audio(tmp_path / "audio")
    workdir = epath.Path(tmp_path / "work")
    prepare.run(made.get_config(tmp_path / "audio"), workdir)
    (path,) = pathlib.Path(workdir / "corpus").glob("speech-validation*")

    def read():
        split = Corpus(workdir / "corpus").split("validation")
        return [split.audio(n) for n in range(len(split))]

    whole, num_errors = read(), 0
    for place in np.linspace(0.05, 0.95, 10):
        before = flip(path, place)
        byte = int(place * len(before))
        if any(before[byte - 8 : byte + 8]):
            num_errors += 1
            with pytest.raises(ValueError, match="hubert prepare again") as error:
                read()
            assert path.name in str(error.value)
        else:
            for got, want in zip(read(), whole, strict=True):
                np.testing.assert_array_equal(got, want)
        path.write_bytes(before)
    assert num_errors > 5


KEEP = checkpoints.CheckpointConfig(every=1, keep_last=1, keep_every=0)


def fresh() -> train.State:
    return train.init_state(tiny.model(), optim.adamw(OPTIM, num_steps=10))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("damage") / "checkpoints"
    rng, state = np.random.default_rng(0), fresh()
    moments = jax.tree.map(
        lambda x: jax.numpy.asarray(rng.normal(size=x.shape, scale=9), x.dtype), state.opt_state
    )
    manager = checkpoints.Checkpoints(folder, KEEP)
    manager.save(train.State(jax.numpy.int32(1), state.model, moments), weights_card())
    manager.close()
    return folder


def weights_card() -> dict:
    config, head = tiny.dataclasses.asdict(tiny.BASE), tiny.dataclasses.asdict(tiny.HEAD)
    made_from = {"model": config, "head": head}
    return {"kind": "checkpoint", "made_from": made_from, **made_from, "num_codes": [12]}


def model_alone(folder) -> dict:
    return weights.to_named(checkpoints.load_model(folder)[0])


def all_of_training(folder) -> dict:
    """What training that is started again goes on from."""
    manager = checkpoints.Checkpoints(folder, KEEP)
    try:
        return weights.to_named(manager.restore(fresh()))
    finally:
        manager.close()


@pytest.mark.parametrize(
    ("item", "read"),
    [("params", model_alone), ("optimizer", all_of_training), ("card", all_of_training)],
)
def test_a_checkpoint(saved, tmp_path, item, read):
    """In each of its larger files, at several places: the same numbers, or an error."""
    whole = read(saved)
    files = [p for p in (saved / "1" / item).rglob("*") if p.is_file()]
    files = [p for p in files if "/d/" in str(p) or p.parent.name == "card"]
    assert files
    num_errors = 0
    for file in files:
        for place in np.linspace(0.01, 0.99, 9) if item == "card" else PLACES:
            folder = tmp_path / "again"
            shutil.copytree(saved, folder)
            flip(folder / file.relative_to(saved), place)
            try:
                found = read(folder)
            except ValueError as error:
                num_errors += 1
                assert str(folder) in str(error) and "damaged" in str(error)
            else:
                for name, want in whole.items():
                    np.testing.assert_array_equal(found[name], want, err_msg=name)
            shutil.rmtree(folder)
    assert num_errors


def test_checksums_see_any_value_change_place_or_bit_and_not_the_layout():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    want = weights.checksums({"a": array})["a"]
    mesh = jax.make_mesh((2,), ("x",))
    for spec in (jax.P("x"), jax.P(None, None, "x"), jax.P()):
        placed = jax.device_put(array, jax.NamedSharding(mesh, spec))
        assert weights.checksums({"a": placed})["a"] == want
    others = [array.swapaxes(0, 0)[::-1].copy()]
    for place in (0, 7, 23):
        for bit in (0, 13, 31):
            changed = array.copy().reshape(-1)
            changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
            others.append(changed.reshape(array.shape))
    assert all(weights.checksums({"a": other})["a"] != want for other in others)
    for dtype in (jax.numpy.bfloat16, np.float16, np.int32):
        assert weights.checksums({"a": array.astype(dtype)})["a"] > 0
