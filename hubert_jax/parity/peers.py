# SPDX-License-Identifier: Apache-2.0
"""The peers at work: transformers, torchaudio and fairseq on random weights, everything recorded.

Each runs its own forward pass; hooks on its modules see what passes. Needs torch and the peer, and
neither jax nor flax, so that fairseq can run in an environment of its own.

B batch, S samples, T frames, C conv channels, D width, N masked frames, K codes
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hubert_jax.ops import frames
from hubert_jax.parity import record
from hubert_jax.parity.record import Record

NORMS = {"base": ("group", False), "large": ("layer", True)}  # conv_norm, pre_norm
TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    conv_width: int
    width: int
    ffn_width: int
    num_heads: int
    num_layers: int
    position_kernel: int
    position_groups: int
    code_width: int
    num_codes: int


SIZES = {
    "stored": Size(8, 16, 32, 4, 2, 16, 4, 8, 12),  # small enough to be kept
    "tiny": Size(24, 32, 64, 4, 3, 128, 4, 8, 12),
    "base": Size(512, 768, 3072, 12, 12, 128, 16, 256, 100),
    "large": Size(512, 1024, 4096, 16, 24, 128, 16, 768, 500),
}


class Peer(NamedTuple):
    """A model of somebody else, its parts, and how to call it."""

    parameters: dict[str, nn.Parameter]
    convolutions: nn.Module
    projection: nn.Module
    layers: nn.ModuleList
    gradient_scale: float
    # (wave_BS, num_samples_B or None) -> output_BTD
    run: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    # (wave_BS, labels_BT, mask_BT) -> logits_NK, sum of cross-entropies, feature penalty
    predict: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    step: Callable[[list[nn.Parameter]], None]  # of AdamW, from the gradients they have


def is_installed(peer: str) -> bool:
    return importlib.util.find_spec(peer) is not None


def version(peer: str) -> str:
    return importlib.import_module(peer).__version__.partition("+")[0]


def make_record(name: str, kind: str, size: Size, *, num_samples: int = 16_000) -> Record:
    """What peer `name` computes on two rows of noise, the second one shorter in the padded run."""
    torch.manual_seed(0)
    peer = PEERS[name](kind, size)
    _spread(peer.parameters, size.width)
    rng = np.random.default_rng(0)
    num_frames = frames.num_frames(num_samples)
    wave_BS = rng.normal(size=(2, num_samples)).astype(np.float32)
    # Of 3 quarters all take the same frames as real; of 4 fifths fairseq takes one more than ours.
    share = 4 / 5 if name == "fairseq" else 3 / 4
    num_samples_B = np.array([num_samples, round(share * num_samples)])
    mask_BT = rng.random((2, num_frames)) < 0.5
    labels_BT = rng.integers(size.num_codes, size=(2, num_frames))
    padded_BS = wave_BS * (np.arange(num_samples) < num_samples_B[:, None])

    arrays = {"wave_BS": wave_BS, "num_samples_B": num_samples_B}
    arrays |= {"mask_BT": mask_BT, "labels_BT": labels_BT}
    arrays |= {f"state/{n}": _numpy(p).copy() for n, p in peer.parameters.items()}
    for run, samples_BS, lengths_B in (
        ("plain", wave_BS, None),
        ("padded", padded_BS.astype(np.float32), torch.from_numpy(num_samples_B)),
    ):  # fmt: skip
        with torch.no_grad(), _watched(peer) as seen:
            seen["output"] = peer.run(torch.from_numpy(samples_BS), lengths_B)
        arrays |= {f"{run}/{part}": _numpy(x) for part, x in seen.items()}

    logits_NK, loss, penalty = _backward(peer, wave_BS, labels_BT, mask_BT)
    arrays |= {"logits_NK": _numpy(logits_NK), "loss": _numpy(loss), "penalty": _numpy(penalty)}
    if name != "fairseq":  # whose norms cast to float32
        _refine_gradients(peer, wave_BS, labels_BT, mask_BT)
    gradients = {n: p.grad for n, p in peer.parameters.items() if p.grad is not None}
    arrays |= {f"gradients/{n}": _numpy(x).copy() for n, x in gradients.items()}
    peer.step(list(peer.parameters.values()))
    arrays |= {f"updated/{n}": _numpy(p) for n, p in peer.parameters.items()}

    fields = dataclasses.asdict(size)
    head = {"code_width": fields.pop("code_width"), "temperature": TEMPERATURE}
    head |= {"untied": False, "code_init": "uniform"}
    num_codes = fields.pop("num_codes")
    conv_norm, pre_norm = NORMS[kind]
    model = fields | {
        "conv_norm": conv_norm, "pre_norm": pre_norm, "conv_bias": False, "normalize_audio": False,
        "gradient_scale": peer.gradient_scale, "input_dropout": 0.0, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "layer_drop": 0.0, "mask_prob": 0.8,
        "mask_length": 10, "compute_dtype": "float32", "unroll": "no", "remat": "none",
    }  # fmt: skip
    return Record(name, version(name), kind, model, head, num_codes, arrays)


def _backward(peer: Peer, wave_BS, labels_BT, mask_BT) -> tuple[torch.Tensor, ...]:
    """Logits, loss and penalty; the parameters have their gradients then."""
    logits_NK, total, penalty = peer.predict(*map(torch.from_numpy, (wave_BS, labels_BT, mask_BT)))
    loss = total / mask_BT.sum() + record.PENALTY * penalty
    loss.backward()
    return logits_NK, loss, penalty


def _refine_gradients(peer: Peer, wave_BS, labels_BT, mask_BT) -> None:
    """The gradients by float64: some are so small that a peer's own rounding uses the tolerance."""
    parameters = peer.parameters.values()
    rounded = [p.data for p in parameters]
    for p in parameters:
        p.grad, p.data = None, p.data.double()
    _backward(peer, wave_BS.astype(np.float64), labels_BT, mask_BT)
    for p, data in zip(parameters, rounded, strict=True):
        grad, p.grad, p.data = p.grad, None, data
        p.grad = None if grad is None else grad.float()


def _spread(parameters: dict[str, nn.Parameter], width: int) -> None:
    """Norms and biases away from 1 and 0, matrices large enough that attention is not flat."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            # fairseq's norms of the convolutions have a number instead of a name
            if "norm" in name or name.endswith(("bias", ".2.weight", ".2.1.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 2 and ".layers." in name:
                parameter.mul_(50 / math.sqrt(width))  # from a deviation of 0.02


@contextlib.contextmanager
def _watched(peer: Peer) -> Iterator[dict[str, torch.Tensor]]:
    """What comes out of convolutions (B, T, C), projection (B, T, D), layers (L + 1, B, T, D)."""
    seen: dict[str, torch.Tensor] = {}
    layers: list[torch.Tensor] = []

    def see(part: str):
        def hook(module, inputs, output):
            seen[part] = _first(output).clone()

        return hook

    def see_layer(module, inputs, output):
        if not layers:
            layers.append(_first(inputs).clone())
        layers.append(_first(output).clone())

    hooks = [
        peer.convolutions.register_forward_hook(see("convolutions")),
        peer.projection.register_forward_hook(see("projection")),
        *[layer.register_forward_hook(see_layer) for layer in peer.layers],
    ]
    yield seen
    for hook in hooks:
        hook.remove()
    seen["layers"] = torch.stack(layers)
    batch, num_frames, _ = seen["projection"].shape
    if seen["convolutions"].shape[1] != num_frames:  # channels first
        seen["convolutions"] = seen["convolutions"].transpose(1, 2)
    if seen["layers"].shape[1] != batch:  # time first, and fairseq makes it even
        seen["layers"] = seen["layers"].transpose(1, 2)
    seen["layers"] = seen["layers"][:, :, :num_frames]


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _adamw(parameters: list[nn.Parameter]) -> None:
    """torch's AdamW, whose eps stands after the bias correction, with eps moved to where it was."""
    beta1, beta2 = record.BETAS
    eps = record.EPS / math.sqrt(1 - beta2)  # right for the first step only
    torch.optim.AdamW(
        parameters, lr=record.LEARNING_RATE, betas=(beta1, beta2), eps=eps,
        weight_decay=record.WEIGHT_DECAY,
    ).step()  # fmt: skip


def kaldi_mfcc39(audio_S: np.ndarray) -> np.ndarray:
    """torchaudio's Kaldi MFCC of int16 audio with deltas, (T, 39), called as fairseq does."""
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    wave_1S = torch.from_numpy(audio_S.astype(np.float32) / 2**15)[None]
    mfccs = kaldi.mfcc(waveform=wave_1S, sample_frequency=frames.SAMPLE_RATE, use_energy=False).T
    deltas = compute_deltas(mfccs)
    return torch.cat([mfccs, deltas, compute_deltas(deltas)]).T.numpy()


# The three.


def transformers_peer(kind: str, size: Size) -> Peer:
    """HubertModel, which has no head: the reference's prediction is written here in torch."""
    import transformers

    conv_norm, pre_norm = NORMS[kind]
    config = transformers.HubertConfig(
        hidden_size=size.width, intermediate_size=size.ffn_width, conv_bias=False,
        num_attention_heads=size.num_heads, num_hidden_layers=size.num_layers,
        conv_dim=(size.conv_width,) * len(frames.CONV_LAYERS), feat_extract_norm=conv_norm,
        num_conv_pos_embeddings=size.position_kernel,
        num_conv_pos_embedding_groups=size.position_groups, do_stable_layer_norm=pre_norm,
    )  # fmt: skip
    model = transformers.HubertModel(config).eval()
    projection = nn.Linear(size.width, size.code_width)
    codes_KE = nn.Parameter(torch.rand(size.num_codes, size.code_width))

    def run(wave_BS, num_samples_B):
        if num_samples_B is None:
            return model(wave_BS).last_hidden_state
        real_BS = torch.arange(wave_BS.shape[1]) < num_samples_B[:, None]
        return model(wave_BS, attention_mask=real_BS.long()).last_hidden_state

    def predict(wave_BS, labels_BT, mask_BT):
        with _watched_output(model.feature_extractor) as convolutions:
            output_BTD = model(wave_BS, mask_time_indices=mask_BT).last_hidden_state
        query_NE = projection(output_BTD[mask_BT])
        logits_NK = functional.cosine_similarity(query_NE[:, None], codes_KE[None], dim=-1)
        logits_NK = logits_NK / TEMPERATURE
        total = functional.cross_entropy(logits_NK, labels_BT[mask_BT], reduction="sum")
        return logits_NK, total, convolutions[0].square().mean()

    head = {f"final_proj.{name}": p for name, p in projection.named_parameters()}
    return Peer(
        dict(model.named_parameters()) | head | {"label_embs_concat": codes_KE},
        model.feature_extractor,
        model.feature_projection.projection,
        model.encoder.layers,
        1.0,
        run,
        predict,
        _adamw,
    )


@contextlib.contextmanager
def _watched_output(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    outputs: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    yield outputs
    hook.remove()


def torchaudio_peer(kind: str, size: Size) -> Peer:
    """hubert_pretrain_model with its own loss; only the mask is given instead of drawn."""
    import torchaudio

    conv_norm, pre_norm = NORMS[kind]
    gradient_scale = 0.1 if kind == "base" else None
    model = torchaudio.models.hubert_pretrain_model(
        extractor_mode=f"{conv_norm}_norm", extractor_conv_bias=False,
        extractor_conv_layer_config=[(size.conv_width, *conv) for conv in frames.CONV_LAYERS],
        encoder_embed_dim=size.width, encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=size.position_kernel, encoder_pos_conv_groups=size.position_groups,
        encoder_num_layers=size.num_layers, encoder_num_heads=size.num_heads,
        encoder_attention_dropout=0.0, encoder_ff_interm_features=size.ffn_width,
        encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=pre_norm,
        encoder_layer_drop=0.0, mask_prob=0.8, mask_selection="static", mask_other=0.0,
        mask_length=10, no_mask_overlap=False, mask_min_space=1, mask_channel_prob=0.0,
        mask_channel_selection="static", mask_channel_other=0.0, mask_channel_length=10,
        no_mask_channel_overlap=False, mask_channel_min_space=1, skip_masked=False,
        skip_nomask=False, num_classes=size.num_codes, final_dim=size.code_width,
        feature_grad_mult=gradient_scale,
    ).eval()  # fmt: skip

    def run(wave_BS, num_samples_B):
        return model.wav2vec2(wave_BS, num_samples_B)[0]

    def predict(wave_BS, labels_BT, mask_BT):
        def given_mask(x_BTD, padding_mask):
            x_BTD[mask_BT] = model.mask_generator.mask_embedding
            return x_BTD, mask_BT

        model.mask_generator.forward = given_mask
        logits_NK1, _, penalty = model(wave_BS, labels_BT)
        targets_N = torch.zeros(len(logits_NK1), dtype=torch.long)
        total = functional.cross_entropy(logits_NK1, targets_N, reduction="sum")
        return _in_order(logits_NK1), total, penalty

    return Peer(
        dict(model.named_parameters()),
        model.wav2vec2.feature_extractor,
        model.wav2vec2.encoder.feature_projection.projection,
        model.wav2vec2.encoder.transformer.layers,
        gradient_scale or 1.0,
        run,
        predict,
        _adamw,
    )


def _in_order(logits_NK1: torch.Tensor) -> torch.Tensor:
    """The reference puts the label's logit first and -inf in its old place: (N, K) as usual."""
    first_N1, others_NK = logits_NK1[:, :1], logits_NK1[:, 1:]
    return torch.where(others_NK.isinf(), first_N1, others_NK)


def fairseq_peer(kind: str, size: Size) -> Peer:
    """The reference: its HubertModel, criterion and Adam; only the mask is given."""
    from fairseq.criterions.hubert_criterion import HubertCriterion
    from fairseq.data import Dictionary
    from fairseq.models.hubert import hubert
    from fairseq.optim.adam import Adam
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    conv_norm, pre_norm = NORMS[kind]
    gradient_scale = 0.1 if kind == "base" else 1.0
    dictionary = Dictionary()  # starts with the four specials
    for code in range(size.num_codes):
        dictionary.add_symbol(str(code))
    config = hubert.HubertConfig(
        label_rate=50.0, extractor_mode={"group": "default", "layer": "layer_norm"}[conv_norm],
        conv_feature_layers=str([(size.conv_width, *conv) for conv in frames.CONV_LAYERS]),
        encoder_embed_dim=size.width, encoder_ffn_embed_dim=size.ffn_width,
        encoder_attention_heads=size.num_heads, encoder_layers=size.num_layers,
        layer_norm_first=pre_norm, conv_pos=size.position_kernel,
        conv_pos_groups=size.position_groups, final_dim=size.code_width, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, encoder_layerdrop=0.0, dropout_input=0.0,
        dropout_features=0.0, feature_grad_mult=gradient_scale, mask_prob=0.8,
    )  # fmt: skip
    task = HubertPretrainingConfig(labels=["km"], label_rate=50.0, sample_rate=frames.SAMPLE_RATE)
    model = hubert.HubertModel(config, task, [dictionary]).eval()
    criterion = HubertCriterion(None, 1.0, 0.0, loss_weights=[record.PENALTY])

    def run(wave_BS, num_samples_B):
        is_padding_BS = None
        if num_samples_B is not None:
            is_padding_BS = torch.arange(wave_BS.shape[1]) >= num_samples_B[:, None]
        return model.extract_features(wave_BS, padding_mask=is_padding_BS, mask=False)[0]

    def predict(wave_BS, labels_BT, mask_BT):
        hubert.compute_mask_indices = lambda *args, **kwargs: mask_BT.numpy()
        inputs = {"source": wave_BS, "padding_mask": torch.zeros_like(wave_BS, dtype=torch.bool)}
        outputs: list[dict[str, Any]] = []
        hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        targets = [labels_BT + dictionary.nspecial]
        sample = {"id": labels_BT[:, 0], "net_input": inputs, "target_list": targets}
        with_penalty, num_masked, _ = criterion(model, sample)
        hook.remove()
        penalty = outputs[0]["features_pen"]
        logits_NK = _in_order(outputs[0]["logit_m_list"][0])
        return logits_NK, with_penalty - record.PENALTY * penalty * num_masked, penalty

    def step(parameters):
        Adam(
            parameters, lr=record.LEARNING_RATE, betas=record.BETAS, eps=record.EPS,
            weight_decay=record.WEIGHT_DECAY,
        ).step()  # fmt: skip

    return Peer(
        dict(model.named_parameters()),
        model.feature_extractor,
        model.post_extract_proj,
        model.encoder.layers,
        gradient_scale,
        run,
        predict,
        step,
    )


PEERS: dict[str, Callable[[str, Size], Peer]] = {
    "transformers": transformers_peer,
    "torchaudio": torchaudio_peer,
    "fairseq": fairseq_peer,
}
