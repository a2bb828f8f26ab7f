# SPDX-License-Identifier: Apache-2.0
"""The encoder computes what transformers' HubertModel computes, layer by layer, on random weights.

Runs where torch and transformers are installed (.ci/run installs them after the other tests).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hubert_jax import weights
from hubert_jax.model import Encoder, HubertConfig

SIZES = {
    "base": dict(conv_norm="group", pre_norm=False),
    "pre_norm": dict(conv_norm="layer", pre_norm=True),
}
CONV_WIDTH, WIDTH, FFN_WIDTH, HEADS, LAYERS, GROUPS = 24, 32, 64, 4, 3, 4


def config(kind: str) -> HubertConfig:
    return HubertConfig(
        **SIZES[kind], conv_width=CONV_WIDTH, conv_bias=False, width=WIDTH, ffn_width=FFN_WIDTH,
        num_heads=HEADS, num_layers=LAYERS, position_kernel=128, position_groups=GROUPS,
        input_dropout=0.0, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        layer_drop=0.0, gradient_scale=1.0, mask_prob=0.8, mask_length=10, normalize_audio=False,
        compute_dtype="float32", unroll="yes", remat="none",
    )  # fmt: skip


@pytest.fixture(params=SIZES)
def pair(request):
    """Theirs with random weights and norms away from 1 and 0, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.HubertModel(
        transformers.HubertConfig(
            hidden_size=WIDTH, intermediate_size=FFN_WIDTH, num_attention_heads=HEADS,
            num_hidden_layers=LAYERS, conv_dim=(CONV_WIDTH,) * 7, conv_bias=False,
            num_conv_pos_embedding_groups=GROUPS, attn_implementation="eager",
            feat_extract_norm=SIZES[request.param]["conv_norm"],
            do_stable_layer_norm=SIZES[request.param]["pre_norm"],
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "attention" in name or "feed_forward" in name:
                parameter.mul_(10.0)  # 0.02 is so small that attention would be flat
    ours = Encoder(config(request.param), key=jax.random.key(0))
    return theirs, weights.from_named(ours, ours_from_theirs(theirs, request.param))


def ours_from_theirs(theirs, kind: str) -> dict[str, np.ndarray]:
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = {
        "mask_embedding_D": state["masked_spec_embed"],
        "projection_norm.scale": state["feature_projection.layer_norm.weight"],
        "projection_norm.bias": state["feature_projection.layer_norm.bias"],
        "projection.kernel": state["feature_projection.projection.weight"].T,
        "projection.bias": state["feature_projection.projection.bias"],
        "norm.scale": state["encoder.layer_norm.weight"],
        "norm.bias": state["encoder.layer_norm.bias"],
        "position.bias": state["encoder.pos_conv_embed.conv.bias"],
    }
    position = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    ours["position.gain_P"] = state[position + "0"].reshape(-1)
    ours["position.kernel"] = state[position + "1"].transpose(2, 1, 0)
    for i in range(7):
        conv = f"feature_extractor.conv_layers.{i}."
        ours[f"extractor.convs.{i}.kernel"] = state[conv + "conv.weight"].transpose(2, 1, 0)
        if i == 0 or kind == "pre_norm":
            ours[f"extractor.norms.{i}.scale"] = state[conv + "layer_norm.weight"]
            ours[f"extractor.norms.{i}.bias"] = state[conv + "layer_norm.bias"]

    def stacked(name):
        return np.stack([state[f"encoder.layers.{i}.{name}"] for i in range(LAYERS)])

    per_layer = {
        "attention_norm": "layer_norm",
        "ffn_norm": "final_layer_norm",
    }
    for mine, its in per_layer.items():
        ours[f"layers.{mine}.scale"] = stacked(its + ".weight")
        ours[f"layers.{mine}.bias"] = stacked(its + ".bias")
    dense = {"ffn_in": "feed_forward.intermediate_dense", "ffn_out": "feed_forward.output_dense"}
    for mine, its in dense.items():
        ours[f"layers.{mine}.kernel"] = stacked(its + ".weight").transpose(0, 2, 1)
        ours[f"layers.{mine}.bias"] = stacked(its + ".bias")
    heads = (LAYERS, WIDTH, HEADS, WIDTH // HEADS)
    ours["layers.attention.qkv.kernel"] = np.stack(
        [stacked(f"attention.{p}_proj.weight").transpose(0, 2, 1).reshape(heads) for p in "qkv"],
        axis=2,
    )
    ours["layers.attention.qkv.bias"] = np.stack(
        [stacked(f"attention.{p}_proj.bias").reshape(LAYERS, HEADS, -1) for p in "qkv"], axis=1
    )
    out = stacked("attention.out_proj.weight").transpose(0, 2, 1)
    ours["layers.attention.out.kernel"] = out.reshape(LAYERS, HEADS, WIDTH // HEADS, WIDTH)
    ours["layers.attention.out.bias"] = stacked("attention.out_proj.bias")
    return {name: jnp.asarray(array) for name, array in ours.items()}


def test_every_layer_is_that_of_transformers(pair):
    theirs, ours = pair
    wave_BS = np.random.default_rng(0).normal(size=(2, 16_000)).astype(np.float32)
    with torch.no_grad():
        output = theirs(torch.from_numpy(wave_BS), output_hidden_states=True)
    for layer, hidden_BTD in enumerate(output.hidden_states):
        got_BTD = ours.features(wave_BS, layer=layer)
        np.testing.assert_allclose(got_BTD, hidden_BTD.numpy(), atol=1e-4, rtol=1e-4)
    last_BTD = ours.contextualize(ours.extract(jnp.asarray(wave_BS)))  # with a pre-norm's last norm
    np.testing.assert_allclose(last_BTD, output.last_hidden_state.numpy(), atol=1e-4, rtol=1e-4)


def test_masked_frames_are_those_of_transformers(pair):
    theirs, ours = pair
    rng = np.random.default_rng(1)
    wave_BS = rng.normal(size=(2, 16_000)).astype(np.float32)
    mask_BT = rng.random((2, 49)) < 0.5
    with torch.no_grad():
        theirs.config.apply_spec_augment = True
        projected = theirs.feature_projection(
            theirs.feature_extractor(torch.from_numpy(wave_BS)).transpose(1, 2)
        )
        masked = theirs._mask_hidden_states(projected, torch.from_numpy(mask_BT))
        want_BTD = theirs.encoder(masked).last_hidden_state.numpy()
    got_BTD = ours.contextualize(ours.extract(jnp.asarray(wave_BS)), mask_BT=jnp.asarray(mask_BT))
    np.testing.assert_allclose(got_BTD, want_BTD, atol=1e-4, rtol=1e-4)
    assert np.abs(got_BTD - ours.contextualize(ours.extract(jnp.asarray(wave_BS)))).max() > 0.1
