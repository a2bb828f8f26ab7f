# SPDX-License-Identifier: Apache-2.0
"""The peers in the bench, each as fast as it is made: scaled-dot-product attention, a fused AdamW,
logits as one matmul where the loss is ours. What is not installed is left out.

B batch, S samples, T frames, D width, C codes, M masked frames
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from hubert_jax.bench import minimal
from hubert_jax.bench.timing import Contender, Work
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames

TEMPERATURE = 0.1
PENALTY = 10.0


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def training(
    config: HubertConfig, code_width: int, wave_BS, labels_BT, *, dtype: str, compiled: bool
) -> list[Contender]:
    """Updates with the dropouts of `config` and without layer drop, as ours."""
    contenders = []
    makers = {
        "transformers": _transformers,
        "torchaudio": _torchaudio,
        "minimal_hubert": minimal.training_loss,
    }
    for peer, make in makers.items():
        if not installed("torch", peer) or (
            peer == "minimal_hubert" and not minimal.size_of(config)
        ):
            continue
        for compile_ in (False, True) if compiled else (False,):

            def prepare(make=make, compile_=compile_) -> Work:
                loss, parameters = make(config, code_width, int(labels_BT.max()) + 1)
                return _torch_step(loss, parameters, wave_BS, labels_BT, dtype, compile_)

            name = peer + (", torch.compile" if compile_ else "")
            note = minimal.UNFAITHFUL if peer == "minimal_hubert" else ""
            contenders.append(Contender(name, prepare, note))
    return contenders


def _torch_step(loss, parameters, wave_BS, labels_BT, dtype: str, compile_: bool) -> Work:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-6, fused=True)
    num_frames = labels_BT.shape[1]
    mask_BT = np.random.default_rng(0).random((len(wave_BS), num_frames)) < 0.567
    given = [torch.from_numpy(x).to(device) for x in (wave_BS, labels_BT, mask_BT)]
    loss = torch.compile(loss) if compile_ else loss

    def work():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(*given)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.item()

    return work


def _transformers(config: HubertConfig, code_width: int, num_codes: int):
    import torch
    from torch.nn import functional

    model = _hubert_model(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    projection = torch.nn.Linear(config.width, code_width).to(device)
    codes_CE = torch.nn.Parameter(torch.rand(num_codes, code_width, device=device))

    def loss(wave_BS, labels_BT, mask_BT):
        conv_BCT = model.feature_extractor(wave_BS)
        penalty = conv_BCT.float().square().mean()
        x_BTD = model.feature_projection(conv_BCT.transpose(1, 2))
        x_BTD = torch.where(mask_BT[..., None], model.masked_spec_embed.to(x_BTD.dtype), x_BTD)
        x_BTD = model.encoder(x_BTD).last_hidden_state
        query_ME = functional.normalize(projection(x_BTD[mask_BT]).float(), dim=-1)
        logits_MC = query_ME @ functional.normalize(codes_CE, dim=-1).T / TEMPERATURE
        return functional.cross_entropy(logits_MC, labels_BT[mask_BT]) + PENALTY * penalty

    return loss, [*model.parameters(), *projection.parameters(), codes_CE]


def _hubert_model(config: HubertConfig, *, num_layers: int | None = None):
    """transformers' model in training mode, on the GPU where there is one."""
    import torch
    import transformers

    settings = transformers.HubertConfig(
        conv_dim=(config.conv_width,) * len(frames.CONV_LAYERS), conv_bias=config.conv_bias,
        num_conv_pos_embeddings=config.position_kernel,
        num_conv_pos_embedding_groups=config.position_groups,
        hidden_size=config.width, intermediate_size=config.ffn_width,
        num_attention_heads=config.num_heads, num_hidden_layers=num_layers or config.num_layers,
        feat_extract_norm=config.conv_norm, do_stable_layer_norm=config.pre_norm,
        hidden_dropout=config.dropout, attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout, feat_proj_dropout=config.input_dropout,
        layerdrop=0.0,
    )  # fmt: skip
    model = transformers.HubertModel(settings).train()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _torchaudio(config: HubertConfig, code_width: int, num_codes: int):
    import torch
    import torchaudio
    from torch.nn import functional

    model = torchaudio.models.hubert_pretrain_model(
        **_torchaudio_encoder(config), mask_prob=0.8, mask_selection="static", mask_other=0.0,
        mask_length=10, no_mask_overlap=False, mask_min_space=1, mask_channel_prob=0.0,
        mask_channel_selection="static", mask_channel_other=0.0, mask_channel_length=10,
        no_mask_channel_overlap=False, mask_channel_min_space=1, skip_masked=False,
        skip_nomask=True, num_classes=num_codes, final_dim=code_width,
        feature_grad_mult=config.gradient_scale if config.gradient_scale < 1 else None,
    ).train()  # fmt: skip
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def loss(wave_BS, labels_BT, mask_BT):
        def given_mask(x_BTD, padding_mask):
            embedding_D = model.mask_generator.mask_embedding.to(x_BTD.dtype)
            return torch.where(mask_BT[..., None], embedding_D, x_BTD), mask_BT

        model.mask_generator.forward = given_mask
        logits, _, penalty = model(wave_BS, labels_BT)
        targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return functional.cross_entropy(logits.float(), targets) + PENALTY * penalty

    return loss, list(model.parameters())


def _torchaudio_encoder(config: HubertConfig) -> dict[str, Any]:
    return {
        "extractor_mode": f"{config.conv_norm}_norm",
        "extractor_conv_layer_config": [(config.conv_width, *conv) for conv in frames.CONV_LAYERS],
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.width,
        "encoder_projection_dropout": config.input_dropout,
        "encoder_pos_conv_kernel": config.position_kernel,
        "encoder_pos_conv_groups": config.position_groups,
        "encoder_num_layers": config.num_layers,
        "encoder_num_heads": config.num_heads,
        "encoder_attention_dropout": config.attention_dropout,
        "encoder_ff_interm_features": config.ffn_width,
        "encoder_ff_interm_dropout": config.activation_dropout,
        "encoder_dropout": config.dropout,
        "encoder_layer_norm_first": config.pre_norm,
        "encoder_layer_drop": 0.0,
    }


def extraction(
    config: HubertConfig, wave_BS, *, layer: int, dtype: str, compiled: bool
) -> list[Contender]:
    """A layer's output: transformers whole and cut after that layer, torchaudio.

    Compiled for fixed shapes: a second number of rows would otherwise be compiled for any number.
    """
    makers: list[tuple[str, Callable[..., Work], int]] = []
    if installed("torch", "transformers"):
        if layer < config.num_layers:
            makers.append(("transformers, whole", _hidden_states, config.num_layers))
        name = "transformers" + (f", cut to {layer} layers" if layer < config.num_layers else "")
        makers.append((name, _hidden_states, layer))
    if installed("torch", "torchaudio"):
        makers.append(("torchaudio", _torchaudio_layer, layer))
    contenders = [
        Contender(
            name + (", torch.compile" if compile_ else ""),
            functools.partial(make, config, wave_BS, num_layers, dtype, compile_),
        )
        for name, make, num_layers in makers
        for compile_ in ((False, True) if compiled else (False,))
    ]
    if installed("torch", "minimal_hubert") and minimal.size_of(config):
        prepare = functools.partial(minimal.layer_output, config, wave_BS, layer, dtype)
        contenders.append(Contender("minimal_hubert", prepare, minimal.UNFAITHFUL))
    return contenders


def _hidden_states(
    config: HubertConfig, wave_BS, num_layers: int, dtype: str, compile_: bool
) -> Work:
    import torch

    model = _hubert_model(config, num_layers=num_layers).eval()
    device = model.device
    compute = torch.compile(model, dynamic=False) if compile_ else model

    @torch.inference_mode()
    def work():
        wave = torch.from_numpy(wave_BS).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return compute(wave).last_hidden_state.float().cpu().numpy()

    return work


def _torchaudio_layer(
    config: HubertConfig, wave_BS, layer: int, dtype: str, compile_: bool
) -> Work:
    import torch
    import torchaudio

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchaudio.models.wav2vec2_model(**_torchaudio_encoder(config), aux_num_out=None)
    model = model.eval().to(device)
    compute = model.extract_features
    if compile_:
        compute = torch.compile(compute, dynamic=False)

    @torch.inference_mode()
    def work():
        wave = torch.from_numpy(wave_BS).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return compute(wave, num_layers=layer)[0][-1].float().cpu().numpy()

    return work


def mfccs(wave_S) -> list[Contender]:
    """torchaudio's Kaldi MFCC with deltas, as fairseq calls it."""
    if not installed("torch", "torchaudio"):
        return []

    def prepare() -> Work:
        import torch
        from torchaudio.compliance import kaldi
        from torchaudio.functional import compute_deltas

        def work():
            wave_1S = torch.from_numpy(wave_S)[None]
            mfcc = kaldi.mfcc(wave_1S, sample_frequency=frames.SAMPLE_RATE, use_energy=False).T
            deltas = compute_deltas(mfcc)
            return torch.cat([mfcc, deltas, compute_deltas(deltas)]).T.numpy()

        return work

    return [Contender("torchaudio's Kaldi", prepare)]
