# SPDX-License-Identifier: Apache-2.0
"""minimal_hubert in the bench, written from the code of its version 0.0.8.

It wants Python 3.12 or newer. Its three sizes are fixed, with the dropouts of the papers.

B batch, S samples, T frames, M masked frames
"""

from hubert_jax.bench.timing import Work
from hubert_jax.model import HubertConfig

# Said beside every time of it.
UNFAITHFUL = (
    "not faithful: penalty x 1 for x 10, no gradient scale 0.1, base on normalised waveforms, "
    "Xavier q/k/v, features before the residual unless asked, imported heads four rows off"
)


def training_loss(config: HubertConfig, code_width: int, num_codes: int):
    """minimal_hubert's model with its own loss, which adds the penalty to every masked frame."""
    import minimal_hubert
    import torch

    model = minimal_hubert.HuBERTPretrain(num_codes, size=size_of(config)).train()
    model.encoder.layer_drop = 0.0
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def loss(wave_BS, labels_BT, mask_BT):
        loss_M, _ = model(wave_BS, labels_BT, mask=mask_BT, attention_mask=None)
        return loss_M.mean()

    return loss, list(model.parameters())


def size_of(config: HubertConfig) -> str | None:
    """Its name for a model like `config`, of which it has three and no others."""
    sizes = {
        (768, 12, 3072, 12, False): "base",
        (1024, 24, 4096, 16, True): "large",
        (1280, 48, 5120, 16, True): "xlarge",
    }
    config_of = (config.width, config.num_layers, config.ffn_width, config.num_heads)
    return sizes.get((*config_of, config.pre_norm))


def layer_output(config: HubertConfig, wave_BS, layer: int, dtype: str) -> Work:
    import minimal_hubert
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = minimal_hubert.HuBERT(size=size_of(config)).eval().to(device)

    @torch.inference_mode()
    def work():
        wave = torch.from_numpy(wave_BS).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            layers = model.get_intermediate_outputs(wave, num_layers=layer, before_residual=False)
        return layers[-1].float().cpu().numpy()

    return work
