# SPDX-License-Identifier: Apache-2.0
"""Ours -> theirs -> ours, bit by bit, in the formats that need no torch."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from hubert_jax.interchange import formats, names, tensors, torchaudio
from tests import tiny
from tests.interchange import made

# What the format cannot hold; test_refusals.py asserts that it says so.
LACKS = {"safetensors": (), "hf": (), "torchaudio": ("two sets", "two sets, untied", "both")}
# Of a format that has no word for these; it reads what is usual (interchange/shapes.py).
HOW = ("compute_dtype", "unroll", "remat")


def write(model, folder, format_):
    formats.write(model, folder, format_=format_)
    if format_ == "safetensors":  # its card is the command's
        card = {"kind": "weights", "made_from": {"format": format_}, **model.facts()}
        (folder / "card.json").write_text(json.dumps(card))


def read(folder, format_):
    return formats.read(folder, format_=format_)


def computed_as(model, back):
    """`back` with the fields that say how, not what, the model computes."""
    how = {field: getattr(model.config, field) for field in HOW}
    return back._replace(config=dataclasses.replace(back.config, **how))


@pytest.mark.parametrize("format_", LACKS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_round_trip_is_bitwise(format_, kind, tmp_path):
    for outputs in made.OUTPUTS.keys() - set(LACKS[format_]):
        for conv_bias in (False, True):
            model = made.model(kind, outputs, conv_bias=conv_bias)
            folder = tmp_path / f"{outputs} {conv_bias}"
            write(model, folder, format_)
            back = read(folder, format_)
            if format_ == "torchaudio" and not model.head:  # nowhere to put it: a new one is drawn
                name = "encoder.mask_embedding_D"
                assert (back.arrays[name] != model.arrays[name]).all()
                assert ((back.arrays[name] >= 0) & (back.arrays[name] < 1)).all()
                back.arrays[name][:] = model.arrays[name]
            made.assert_same(model, computed_as(model, back))


@pytest.mark.parametrize("format_", LACKS)
def test_models_that_are_not_as_the_published_ones(format_, tmp_path):
    """Every field that changes what is computed comes back, also where it is unusual."""
    model = made.model("large", pre_norm=False, normalize_audio=False, num_heads=2, dropout=0.3,
                       layer_drop=0.2, position_groups=2, position_kernel=16)  # fmt: skip
    write(model, tmp_path, format_)
    made.assert_same(model, computed_as(model, read(tmp_path, format_)))


def test_symbols_and_the_blank_come_back(tmp_path):
    ctc = made.CtcConfig(("a", "\u00df", "_", " "), 2)
    model = made.model("base", "ctc")
    arrays = {
        name: x[..., :4] if name.startswith("ctc.") else x for name, x in model.arrays.items()
    }
    model = model._replace(ctc=ctc, arrays=arrays)
    for format_ in LACKS:
        write(model, tmp_path / format_, format_)
        assert read(tmp_path / format_, format_).ctc == ctc


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
    """Halves exactly, so that what was a half is one again when rounded back."""
    model = made.model("base", "one set")
    formats.write(model, tmp_path, format_="torchaudio")
    path = tmp_path / "model.safetensors"
    narrow = {name: x.astype(dtype) for name, x in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(narrow, path)
    assert all(x.dtype == np.float32 for x in tensors.read(path).values())
    back = torchaudio.read(tmp_path)
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array.astype(dtype).astype(np.float32))
        if dtype != np.float64:
            np.testing.assert_array_equal(back.arrays[name].astype(dtype), array.astype(dtype))
            assert (back.arrays[name] != array).any(), name


def test_bfloat16_bits_are_the_upper_half_of_float32(tmp_path):
    """A file written byte by byte: nobody's library rounds here."""
    bits = np.array([0x3F80, 0xC049, 0x0001, 0x7F80], np.uint16)  # 1, -pi, the least, infinity
    header = {"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bits.tobytes())
    (x,) = tensors.read(path).values()
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x.view(np.uint32), bits.astype(np.uint32) << 16)


def test_both_spellings_of_weight_norm_are_read(tmp_path):
    model = made.model("large", "one set")
    formats.write(model, tmp_path, format_="hf")
    path = tmp_path / "model.safetensors"
    state = safetensors.numpy.load_file(path)
    old = names.respelled(state, names.OLD_SPELLING)
    assert state.keys() - old.keys() == {
        f"encoder.pos_conv_embed.conv.{name}" for name in names.NEW_SPELLING
    }
    assert old.keys() - state.keys() == {
        f"encoder.pos_conv_embed.conv.{name}" for name in names.OLD_SPELLING
    }
    safetensors.numpy.save_file(old, path)
    made.assert_same(model, read(tmp_path, "hf"))
    safetensors.numpy.save_file(state | old, path)
    with pytest.raises(
        ValueError, match=r"weight norm is there in both spellings: remove .*original0"
    ):
        read(tmp_path, "hf")


@pytest.mark.parametrize("num_shards", [1, 3])
def test_shards_are_put_together(num_shards, tmp_path):
    model = made.model("base", "ctc")
    formats.write(model, tmp_path, format_="hf")
    state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"part-{i % num_shards}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(places.values()):
        part = {name: x for name, x in state.items() if places[name] == file}
        safetensors.numpy.save_file(part, tmp_path / file)
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    made.assert_same(model, read(tmp_path, "hf"))


def test_a_file_goes_before_an_index(tmp_path):
    """As in transformers, where a folder has both."""
    model = made.model("base", "one set")
    formats.write(model, tmp_path, format_="hf")
    formats.write(made.model("base", "one set", seed=1), tmp_path / "other", format_="hf")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": {"masked_spec_embed": "part.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    made.assert_same(model, read(tmp_path, "hf"))
    (tmp_path / "model.safetensors").unlink()
    name = "encoder.mask_embedding_D"
    assert (read(tmp_path, "hf").arrays[name] != model.arrays[name]).all()


@pytest.mark.parametrize("outputs", ["bare", "ctc"])
def test_bundles_of_torchaudio_wrap_the_model(outputs, tmp_path):
    formats.write(made.model("large", outputs), tmp_path, format_="torchaudio")
    plain = read(tmp_path, "torchaudio")
    path = tmp_path / "model.safetensors"
    state = safetensors.numpy.load_file(path)
    wrapped = {f"model.{name}": x for name, x in state.items()}
    safetensors.numpy.save_file(wrapped, path)
    made.assert_same(plain, read(tmp_path, "torchaudio"))
    safetensors.numpy.save_file(wrapped | {"other.bias": np.zeros(1, np.float32)}, path)
    with pytest.raises(ValueError, match="no HuBERT of torchaudio"):
        read(tmp_path, "torchaudio")


def test_normalize_audio_is_that_of_the_preprocessor(tmp_path, capsys):
    for normalize_audio in (False, True):
        model = made.model("base", normalize_audio=normalize_audio)
        formats.write(model, tmp_path, format_="hf")
        path = tmp_path / "preprocessor_config.json"
        assert json.loads(path.read_text())["do_normalize"] is normalize_audio
        assert read(tmp_path, "hf").config.normalize_audio is normalize_audio
        path.write_text(json.dumps({"do_normalize": not normalize_audio}))
        assert read(tmp_path, "hf").config.normalize_audio is not normalize_audio
    # A processor of transformers 5 has a file around it, which goes before the other.
    processor = tmp_path / "processor_config.json"
    processor.write_text(json.dumps({"processor_class": "Wav2Vec2Processor"}))
    assert not read(tmp_path, "hf").config.normalize_audio
    processor.write_text(json.dumps({"feature_extractor": {"do_normalize": True}}))
    assert read(tmp_path, "hf").config.normalize_audio
    processor.unlink()
    path.write_text(json.dumps({"feature_size": 1}))  # as Wav2Vec2FeatureExtractor has it
    assert read(tmp_path, "hf").config.normalize_audio
    # Without the file: what we wrote into config.json, else what the published models have.
    path.unlink()
    assert read(tmp_path, "hf").config.normalize_audio
    config = json.loads((tmp_path / "config.json").read_text())
    del config["hubert_jax"]["normalize_audio"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert not read(tmp_path, "hf").config.normalize_audio
    assert "no preprocessor_config.json: waveforms are taken to be not" in capsys.readouterr().out


def test_an_encoder_from_which_the_head_was_taken(tmp_path):
    """transformers keeps our section of config.json and loses our file."""
    model = made.model("base", "one set")
    formats.write(model, tmp_path, format_="hf")
    (tmp_path / "pretraining_head.safetensors").unlink()
    back = read(tmp_path, "hf")
    assert back.head is None and back.num_codes == ()
    assert back.arrays.keys() == {x for x in model.arrays if not x.startswith("head.")}


def test_a_state_dict_alone_is_a_published_model(tmp_path, capsys):
    """torchaudio's file without ours beside it; its heads are known by the width, or given."""
    model = made.model("large", "one set")
    formats.write(model, tmp_path, format_="torchaudio")
    (tmp_path / "torchaudio.json").unlink()
    with pytest.raises(ValueError, match=r"known for the widths 768, 1024, 1280 only and not for"):
        read(tmp_path, "torchaudio")
    back = formats.read(
        tmp_path / "model.safetensors", format_="torchaudio", num_heads=model.config.num_heads
    )
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array)
    fields = ("num_heads", "conv_norm", "pre_norm", "normalize_audio", "gradient_scale")
    for field in fields:
        assert getattr(back.config, field) == getattr(model.config, field)
