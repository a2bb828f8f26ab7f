# SPDX-License-Identifier: Apache-2.0
"""Models of the published sizes: weights to and fro, and one utterance alone and in a batch."""

import functools

import jax
import numpy as np
import pytest

from hubert_jax import config_files, encode
from hubert_jax.heads import HeadConfig, Weights
from hubert_jax.interchange import formats
from hubert_jax.model import Encoder, HubertConfig
from hubert_jax.ops import frames

pytestmark = pytest.mark.full_size
KINDS = ("base", "large")


def config(kind: str) -> HubertConfig:
    fields = config_files.load(f"configs/{kind}.py").model.to_dict()
    return HubertConfig(**(fields | {"compute_dtype": "float32", "unroll": "no"}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format_", ["hf", "fairseq", "torchaudio"])
def test_weights_come_back_bitwise(kind, format_, tmp_path):
    head = HeadConfig(**config_files.load(f"configs/{kind}.py").head)
    model = Weights(config(kind), head, (500,), None, {})
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(s, np.float32) for name, s in model.shapes().items()}
    formats.write(model._replace(arrays=arrays), tmp_path, format_=format_)
    found = formats.read(tmp_path, format_=format_)
    assert (found.config.num_layers, found.num_codes) == (model.config.num_layers, (500,))
    assert found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


@pytest.mark.parametrize("kind", KINDS)
def test_an_utterance_is_the_same_alone_and_beside_longer_ones(kind):
    """Within 1e-5, though large's residual grows to values of 13: no sum depends on the padding."""
    encoder = jax.jit(lambda key: Encoder(config(kind), key=key))(jax.random.key(0))
    lengths_B = np.array([2_000, 13_000, 33_000])
    rng = np.random.default_rng(0)
    wave_BS = 0.1 * rng.standard_normal((3, 80_000), np.float32)

    @functools.partial(jax.jit, static_argnames="layer")
    def features(encoder, wave_BS, lengths_B, *, layer):
        return encoder.features(wave_BS, layer=layer, num_samples_B=lengths_B)

    num_layers = encoder.config.num_layers
    for layer in (0, num_layers // 2, num_layers):
        beside_BTD = features(encoder, wave_BS, lengths_B, layer=layer)
        for row, length in enumerate(lengths_B):
            one = slice(row, row + 1)
            rung = encode.LADDER[np.searchsorted(encode.LADDER, length)]
            num_frames = frames.num_frames(length)
            for padded in {max(length, lengths_B[1]), rung}:
                (alone_TD,) = features(encoder, wave_BS[one, :padded], lengths_B[one], layer=layer)
                difference = np.abs(alone_TD[:num_frames] - beside_BTD[row, :num_frames]).max()
                assert difference <= 1e-5, (layer, length, padded)
