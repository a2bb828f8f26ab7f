# SPDX-License-Identifier: Apache-2.0
"""Export and the Python call: the same features by both roads, for audio of any length."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import soxr

import hubert_jax
from hubert_jax import checkpoints, encode, frame_files, heads, model, train, weights
from hubert_jax.data import batches, cards
from hubert_jax.ops import frames, windows
from hubert_jax.stages import export, import_

DEMO = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"
WIDTH, LAYER = 16, 2
MODEL = dict(
    conv_width=8,
    conv_norm="group",
    conv_bias=False,
    width=WIDTH,
    ffn_width=32,
    num_heads=2,
    num_layers=3,
    pre_norm=True,
    position_kernel=8,
    position_groups=2,
    input_dropout=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    layer_drop=0.0,
    gradient_scale=1.0,
    mask_prob=0.8,
    mask_length=10,
    normalize_audio=False,
    compute_dtype="float32",
    unroll="auto",
    remat="none",
)
HEAD = dict(code_width=4, temperature=0.1, untied=False, code_init="normal")


def random_model(fields):
    """Parameters from numpy: nothing to compile, and layers that do something at this width."""
    config, head = model.HubertConfig(**fields), heads.HeadConfig(**HEAD)
    abstract = heads.abstract(config, head, (5,))
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=like.shape, scale=0.2).astype(np.float32)
        if len(like.shape) > 1 and "norm" not in name
        else np.ones(like.shape, np.float32)
        for name, like in weights.to_named(abstract).items()
    }
    return jax.tree.map(jax.numpy.asarray, weights.from_named(abstract, arrays))


def write_checkpoint(folder, **changes):
    fields = MODEL | changes
    hubert = random_model(fields)
    saved = checkpoints.Checkpoints(
        folder, checkpoints.CheckpointConfig(every=1, keep_last=1, keep_every=0)
    )
    card = cards.new("checkpoint", made_from={}, model=fields, head=HEAD, num_codes=(5,))
    saved.save(train.State(jax.numpy.int32(7), hubert, {"count": jax.numpy.zeros(1)}), card)
    saved.close()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("it1") / "checkpoints")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return hubert_jax.load(checkpoint)


def speechlike(seconds, *, rate=16_000, seed=0):
    """Noise that changes its colour and level every 0.1 s."""
    generator = np.random.default_rng(seed)
    num_samples = round(seconds * rate)
    knots = np.arange(0, num_samples + rate // 10, rate // 10)
    level = np.interp(np.arange(num_samples), knots, generator.uniform(0.01, 0.2, len(knots)))
    pitch = np.interp(np.arange(num_samples), knots, generator.uniform(80, 3000, len(knots)))
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / rate)
    return (level * (tone + 0.3 * generator.normal(size=num_samples))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    (folder / "speaker1").mkdir()
    soundfile.write(folder / "speaker1" / "a.flac", speechlike(1.3, seed=1), 16_000)
    soundfile.write(folder / "speaker1" / "b.wav", speechlike(2.2, rate=8000, seed=2), 8000)
    stereo = np.stack([speechlike(2.5, seed=3), speechlike(2.5, seed=4)], axis=1)
    soundfile.write(folder / "stereo.wav", stereo, 16_000)
    soundfile.write(folder / "long.flac", speechlike(61.0, seed=5), 16_000)
    soundfile.write(folder / "short.wav", np.zeros(399), 16_000)
    (folder / os.fsdecode(b"brok\xe9n\t2.wav")).write_bytes(b"RIFF, but no audio")
    return folder


GOOD = {"speaker1/a", "speaker1/b", "stereo", "long"}


def run(kind, checkpoint, folder, out, *options):
    export.main(
        [kind, f"--checkpoint={checkpoint}", f"--audio={folder}", f"--out={out}"]
        + ["--batch_seconds=10", *options]
    )


@pytest.fixture(scope="module")
def exported(checkpoint, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("features")
    run("features", checkpoint, folder, out, f"--layer={LAYER}")
    return out


def write_codebook(path, checkpoint, *, layer, encoder=None):
    source = hubert_jax.load(checkpoint)._source(layer)
    facts = cards.normal(source.facts)
    if encoder is not None:
        facts["checkpoint"]["encoder"] = encoder
    centers_CD = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)
    np.savez(path, centers_CD=centers_CD)
    cards.write(
        path.with_suffix(".json"),
        cards.new("codebook", made_from={}, source=facts, digest=cards.digest(path)),
    )
    return path, centers_CD


def names(out):
    return {str(path.relative_to(out).with_suffix("")) for path in out.rglob("*.npy")}


def test_features_of_files_are_those_of_the_call(exported, folder, loaded):
    assert names(exported) == GOOD
    for id_, file in (("speaker1/a", "speaker1/a.flac"), ("stereo", "stereo.wav")):
        wave = soundfile.read(folder / file, dtype="float32", always_2d=True)[0].mean(axis=1)
        stored_TD = np.load(exported / f"{id_}.npy")
        assert stored_TD.shape == (frames.num_frames(len(wave)), WIDTH)
        assert stored_TD.dtype == np.float32
        np.testing.assert_allclose(
            stored_TD, loaded.features(wave, layer=LAYER), atol=2e-5, rtol=1e-5
        )
        assert np.abs(stored_TD - loaded.features(wave, layer=LAYER - 1)).max() > 0.1
    wave, rate = soundfile.read(folder / "speaker1/b.wav", dtype="float32")
    stored_TD = np.load(exported / "speaker1/b.npy")
    np.testing.assert_allclose(
        stored_TD, loaded.features(wave, layer=LAYER, sample_rate=rate), atol=2e-5, rtol=1e-5
    )
    resampled = soxr.resample(wave, rate, 16_000)
    np.testing.assert_allclose(
        stored_TD, loaded.features(resampled, layer=LAYER), atol=2e-5, rtol=1e-5
    )


def test_card_says_how_to_read_the_features(exported):
    card = cards.read(exported / "card.json")
    assert (card["kind"], card["layer"], card["width"], card["mode"]) == (
        "features", LAYER, WIDTH, "exact",
    )  # fmt: skip
    assert (card["hop_seconds"], card["offset_seconds"]) == (0.02, 0.0125)
    assert (card["num_utterances"], card["num_rejected"], card["is_finished"]) == (4, 2, True)
    assert card["made_from"]["source"]["checkpoint"]["step"] == 7


def test_what_cannot_be_read_is_listed(exported):
    rejected = dict(
        line.split("\t") for line in (exported / "rejected.tsv").read_text().splitlines()
    )
    assert set(rejected) == {r"brok\udce9n 2", "short"}  # no UTF-8, and a tab
    assert "399 samples" in rejected["short"]


def test_export_goes_on_where_it_stopped(exported, checkpoint, folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*.npy")}
    gone = exported / "stereo.npy"
    content = np.load(gone)
    gone.unlink()
    run("features", checkpoint, folder, exported, f"--layer={LAYER}")
    changed = {p for p in exported.rglob("*.npy") if p.stat().st_mtime_ns != before[p]}
    assert changed == {gone}
    np.testing.assert_allclose(np.load(gone), content, atol=1e-6)
    with pytest.raises(ValueError, match=r"made_from\.source\.layer is 2, this run has 1"):
        run("features", checkpoint, folder, exported, "--layer=1")
    assert names(exported) == GOOD


def test_long_audio_is_as_in_one_pass(exported, folder, loaded):
    wave, _ = soundfile.read(folder / "long.flac", dtype="float32")
    windowed_TD = np.load(exported / "long.npy")
    np.testing.assert_allclose(
        windowed_TD, loaded.features(wave, layer=LAYER), atol=2e-5, rtol=1e-5
    )
    one_pass = jax.jit(lambda wave_BS: loaded._encoder.features(wave_BS, layer=LAYER))
    whole_TD = np.asarray(one_pass(wave[None])[0])
    assert windowed_TD.shape == whole_TD.shape

    # A window hears less than the recording; measured against how much a frame differs from the
    # next one, that is little, though this model is random and listens everywhere alike.
    step_T = np.linalg.norm(np.diff(whole_TD, axis=0), axis=1)
    error_T = np.linalg.norm(windowed_TD - whole_TD, axis=1)
    assert 0 < np.median(error_T) < 0.05 * np.median(step_T)
    assert error_T.max() < 0.2 * np.median(step_T)

    # From a frame to the next, what the windows change is no more in the seam than far from it;
    # where windows are put end to end without a fade, it is.
    start = windows.WINDOW - windows.OVERLAP

    def change(features_TD, frame):
        return np.linalg.norm(
            np.diff(features_TD[frame : frame + 2], axis=0)
            - np.diff(whole_TD[frame : frame + 2], axis=0)
        )

    faded = [change(windowed_TD, frame) for frame in range(start - 1, windows.WINDOW)]
    inside = [change(windowed_TD, frame) for frame in range(100, start - 100)]
    longest = frames.num_samples(windows.WINDOW)
    first_TD, second_TD = (
        loaded.features(wave[frame * frames.HOP :][:longest], layer=LAYER) for frame in (0, start)
    )
    hard_TD = {
        cut: np.concatenate([first_TD[:cut], second_TD[cut - start :]])
        for cut in range(start + 1, windows.WINDOW)
    }
    hard = [change(joined_TD, cut - 1) for cut, joined_TD in hard_TD.items()]
    assert np.median(faded) < np.median(inside)
    assert np.max(faded) < np.max(inside) < 0.5 * np.max(hard)


def test_units_expand_back(checkpoint, folder, loaded, exported, tmp_path):
    path, centers_CD = write_codebook(tmp_path / "codebook.npz", checkpoint, layer=LAYER)
    run("units", checkpoint, folder, tmp_path / "out", f"--codebook={path}")
    assert names(tmp_path / "out") == GOOD
    lines = [json.loads(x) for x in (tmp_path / "out" / "units.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == GOOD
    for line in lines:
        codes_T = np.load(tmp_path / "out" / f"{line['id']}.npy")
        assert codes_T.dtype == np.int16
        np.testing.assert_array_equal(np.repeat(line["units"], line["durations"]), codes_T)
        assert (np.diff(line["units"]) != 0).all()
        features_TD = np.load(exported / f"{line['id']}.npy")
        distances = np.linalg.norm(features_TD[:, None] - centers_CD, axis=2)
        assert (codes_T == distances.argmin(axis=1)).mean() > 0.995  # but for rounding
    wave, _ = soundfile.read(folder / "speaker1/a.flac", dtype="float32")
    codes_T = np.load(tmp_path / "out" / "speaker1/a.npy")
    np.testing.assert_array_equal(loaded.units(wave, path), codes_T)
    np.testing.assert_array_equal(loaded.units(wave, centers_CD, layer=LAYER), codes_T)
    assert len(np.unique(codes_T)) > 1


def test_an_imported_codebook_gives_units(checkpoint, folder, loaded, tmp_path):
    centers_CD = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)
    np.save(tmp_path / "km.npy", centers_CD)
    import_.main(
        ["codebook", f"--path={tmp_path / 'km.npy'}", f"--config={DEMO}:it2"]
        + [f"--workdir={tmp_path / 'work'}", f"--config.features.checkpoint={checkpoint}"]
        + [f"--config.features.layer={LAYER}", "--config.kmeans.num_codes=5"]
    )
    path = tmp_path / "work" / "it2" / "codebook.npz"
    run("units", checkpoint, folder, tmp_path / "out", f"--codebook={path}")
    wave, _ = soundfile.read(folder / "speaker1/a.flac", dtype="float32")
    codes_T = np.load(tmp_path / "out" / "speaker1/a.npy")
    np.testing.assert_array_equal(codes_T, loaded.units(wave, centers_CD, layer=LAYER))
    assert len(np.unique(codes_T)) > 1


def test_codebooks_of_something_else_are_refused(checkpoint, folder, loaded, tmp_path):
    path, _ = write_codebook(tmp_path / "codebook.npz", checkpoint, layer=LAYER)
    with pytest.raises(ValueError, match=r"made from layer 2, but layer 1 was asked for"):
        run("units", checkpoint, folder, tmp_path / "out", f"--codebook={path}", "--layer=1")
    write_codebook(path, checkpoint, layer=LAYER, encoder="sha256:0")
    with pytest.raises(ValueError, match=r"with checkpoint.encoder .sha256:0., but here"):
        loaded.units(speechlike(1), path)
    with pytest.raises(ValueError, match=r"give layer="):
        loaded.units(speechlike(1), np.zeros((5, WIDTH)))
    with pytest.raises(ValueError, match=r"centres of shape \(5, 3\)"):
        loaded.units(speechlike(1), np.zeros((5, 3)), layer=1)


def test_call_refuses_what_is_no_wave(loaded):
    for wave, problem in (
        (np.zeros(399, np.float32), "too short: 399 samples"),
        (np.zeros(16_000, np.int16), "divide int16 by 32768"),
        (np.zeros((2, 16_000)), r"shape \(2, 16000\)"),
        (np.full(16_000, np.nan), "16000 samples are not finite"),
    ):
        with pytest.raises(ValueError, match=problem):
            loaded.features(wave, layer=0)
    with pytest.raises(ValueError, match=r"layer 4 was asked for, the model has 0 to 3"):
        loaded.features(np.zeros(16_000), layer=4)


def test_padding_to_the_ladder_leaves_no_trace(loaded):
    wave = speechlike(1.0)
    alone = jax.jit(lambda wave_BS: loaded._encoder.features(wave_BS, layer=LAYER)[0])
    np.testing.assert_allclose(
        loaded.features(wave, layer=LAYER), alone(wave[None]), atol=2e-5, rtol=1e-5
    )


def test_large_models_get_whole_recordings_normalized(tmp_path):
    changes = dict(conv_norm="layer", normalize_audio=True)
    loaded = hubert_jax.load(write_checkpoint(tmp_path / "checkpoints", **changes))
    wave = speechlike(2.5)
    features_TD = loaded.features(wave, layer=1)
    np.testing.assert_allclose(features_TD, loaded.features(wave + 0.3, layer=1), atol=1e-3)
    encode_ = jax.jit(lambda wave_BS: loaded._encoder.features(wave_BS, layer=1)[0])
    np.testing.assert_allclose(features_TD, encode_(batches.normalized(wave)[None]), atol=1e-4)
    assert np.abs(features_TD - encode_(wave[None] + 0.3)).max() > 0.1
    # In blocks as at once, and not window by window.
    recording = encode.Recording("x", lambda: np.split(wave, [7, 20_000]))
    normalized = np.concatenate(list(encode._normalized(recording)))
    np.testing.assert_allclose(normalized, batches.normalized(wave), atol=1e-5)


def test_corpus_is_exported_by_its_ids(checkpoint, loaded, monkeypatch, tmp_path):
    waves = {"train/x": speechlike(1.0, seed=1), "validation/y": speechlike(1.1, seed=2)}

    class FakeSplit:
        def __init__(self, id_):
            self.ids, self.num_samples = [id_], np.array([len(waves[id_])])
            self.audio = lambda position: waves[id_]

    class FakeCorpus:
        card = {"fingerprint": "sha256:1"}  # noqa: RUF012
        splits = ("train/x", "validation/y")
        split = staticmethod(FakeSplit)

    monkeypatch.setattr(frame_files, "Corpus", lambda folder: FakeCorpus)
    export.main(
        ["features", f"--checkpoint={checkpoint}", "--corpus=WORK/corpus", "--layer=1"]
        + [f"--out={tmp_path}", "--dtype=float16"]
    )
    assert names(tmp_path) == set(waves)
    for id_, wave in waves.items():
        stored_TD = np.load(tmp_path / f"{id_}.npy")
        assert stored_TD.dtype == np.float16
        np.testing.assert_allclose(stored_TD, loaded.features(wave, layer=1), atol=2e-3, rtol=1e-3)


def test_ids_stay_inside(tmp_path):
    for id_ in ("../x", "/etc/x", "a/../../x", ""):
        with pytest.raises(ValueError, match=r"would be written outside"):
            frame_files.output_paths([id_], tmp_path)
    with pytest.raises(ValueError, match=r"two recordings have the id 'a'"):
        frame_files.output_paths(["a", "b", "a"], tmp_path)


def test_nothing_readable_is_an_error(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no audio below it"):
        run("features", checkpoint, tmp_path, tmp_path / "out", "--layer=1")
    (tmp_path / "broken.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"1 of 1 recordings left out.*broken"):
        run("features", checkpoint, tmp_path, tmp_path / "out", "--layer=1")


def test_weights_are_those_of_the_model(checkpoint, tmp_path):
    for _ in range(2):
        export.main(["weights", f"--checkpoint={checkpoint}", f"--out={tmp_path}"])
    named = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    hubert, _ = checkpoints.load_model(checkpoint)
    np.testing.assert_array_equal(
        named["encoder.layers.ffn_in.kernel"], hubert.encoder.layers.ffn_in.kernel[...]
    )
    assert named["encoder.layers.ffn_in.kernel"].shape == (3, WIDTH, 32)
    assert sum(a.size for a in named.values()) == sum(x.size for x in jax.tree.leaves(hubert))
    card = cards.read(tmp_path / "card.json")
    assert (card["kind"], card["step"], card["model"]["width"]) == ("weights", 7, WIDTH)


def test_first_differing_runs():
    codes_T = np.array([3, 3, 0, 0, 0, 3], np.int16)
    units_N, durations_N = frame_files.run_lengths(codes_T)
    assert units_N.tolist() == [3, 0, 3] and durations_N.tolist() == [2, 3, 1]
