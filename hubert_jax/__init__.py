# SPDX-License-Identifier: Apache-2.0
"""HuBERT pretraining in JAX: from a folder of speech to an encoder, its units and its features."""

__version__ = "0.3.0"


def load(path):
    """The encoder of a checkpoint, numpy in and numpy out.

        model = hubert_jax.load("work/it2/checkpoints")
        features_TD = model.features(wave_S, layer=6)  # wave_S: float32 in [-1, 1], 16 kHz, mono

    `path` is the checkpoints folder of an iteration (its latest step) or one step's folder.
    """
    from hubert_jax import encode  # jax is loaded by those who use it, not by `hubert --help`

    return encode.load(path)
