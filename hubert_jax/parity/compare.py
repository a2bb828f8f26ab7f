# SPDX-License-Identifier: Apache-2.0
"""Ours against a peer's record: one row for every quantity.

Parts are compared alone, from the peer's own input, within 1e-5, and through all that comes before
them, within 1e-4.

B batch, S samples, T frames, C conv channels, D width, L layers, N masked frames, K codes
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hubert_jax import heads, optim, weights
from hubert_jax.interchange import fairseq, names
from hubert_jax.model import HubertConfig, valid_frames
from hubert_jax.ops import losses
from hubert_jax.parity import record
from hubert_jax.parity.record import Record

PART, STACK = 1e-5, 1e-4  # tolerances, float32


class Row(NamedTuple):
    quantity: str
    peer: str  # and its version
    model: str
    difference: float  # the largest
    relative: float  # to the largest value of theirs
    tolerance: float  # of the difference, or of the relative one where values exceed 1
    note: str = ""
    is_small: bool = False  # values are far below 1, so that only the relative one says anything

    @property
    def is_within(self) -> bool:
        found = self.relative if self.is_small else min(self.difference, self.relative)
        return found <= self.tolerance


def compare(theirs: Record) -> list[Row]:
    """Every quantity of a record. Raises ValueError when its weights are not those of the model."""
    rows: list[Row] = []

    def row(quantity: str, ours, wanted, tolerance: float) -> None:
        rows.append(difference(quantity, peer, theirs.kind, ours, wanted, tolerance))

    def row_of_layers(quantity: str, ours, wanted, tolerance: float) -> None:
        rows.append(_worst_layer(quantity, peer, theirs.kind, ours, wanted, tolerance))

    peer = f"{theirs.peer} {theirs.version}"
    ours = _Ours(theirs)
    wave_BS = jnp.asarray(theirs.arrays["wave_BS"])
    seen = theirs.below("plain")
    conv_BTC = ours.extract(wave_BS)
    row("convolutions", conv_BTC, seen["convolutions"], STACK)
    row("projection alone", ours.project(seen["convolutions"]), seen["projection"], PART)
    row("position alone", ours.embed(seen["convolutions"]), seen["layers"][0], PART)
    alone = [ours.layer(i, x_BTD) for i, x_BTD in enumerate(seen["layers"][:-1])]
    row_of_layers("each layer alone", alone, seen["layers"][1:], PART)
    row_of_layers("every layer", ours.layers(conv_BTC), seen["layers"], STACK)
    row("output", ours.output(conv_BTC), seen["output"], STACK)

    seen = theirs.below("padded")
    num_samples_B = jnp.asarray(theirs.arrays["num_samples_B"])
    real_BS = jnp.arange(wave_BS.shape[1]) < num_samples_B[:, None]
    valid_BT = valid_frames(wave_BS.shape[1], num_samples_B, padding="reference")
    conv_BTC = ours.extract(wave_BS * real_BS, num_samples_B)
    row("convolutions, padded batch", conv_BTC, seen["convolutions"], STACK)
    layers = ours.layers(conv_BTC, valid_BT)
    real = layers[:, valid_BT], seen["layers"][:, valid_BT]
    row_of_layers("every layer, padded batch", *real, STACK)
    output_BTD = ours.output(conv_BTC, valid_BT)
    row("output, padded batch", output_BTD[valid_BT], seen["output"][valid_BT], STACK)

    logits_NK, loss, penalty, gradients = ours.train(wave_BS)
    row("logits", logits_NK, theirs.arrays["logits_NK"], STACK)
    row("loss", loss, theirs.arrays["loss"], STACK)
    row("feature penalty", penalty, theirs.arrays["penalty"], STACK)
    wanted = theirs.below("gradients")
    rows.append(_gradients(gradients, wanted, peer, theirs.kind))
    del gradients
    updated, wanted = ours.step(wanted), theirs.below("updated")
    differences = [float(np.abs(updated[name] - wanted[name]).max()) for name in wanted]
    largest = max(float(np.abs(x).max()) for x in wanted.values())
    found = max(differences), max(differences) / largest
    rows.append(Row("AdamW step from the peer's gradients", peer, theirs.kind, *found, PART))
    return rows


def difference(quantity: str, peer: str, model: str, ours, wanted, tolerance: float) -> Row:
    """A row for two arrays of one shape."""
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    if ours.shape != wanted.shape:
        raise AssertionError(f"{quantity}: {ours.shape} here, {wanted.shape} there")
    largest = float(np.abs(ours - wanted).max())
    return Row(quantity, peer, model, largest, largest / float(np.abs(wanted).max()), tolerance)


def _worst_layer(quantity: str, peer: str, model: str, ours, wanted, tolerance: float) -> Row:
    """The layer that is furthest off for its own size."""
    rows = [
        difference(quantity, peer, model, *pair, tolerance)
        for pair in zip(ours, wanted, strict=True)
    ]
    return max(rows, key=lambda row: min(row.difference, row.relative))


def _gradients(
    ours: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], peer: str, model: str
) -> Row:
    """The parameter whose gradient is furthest from the peer's, relative to its largest value.

    A gradient that is 0 but for rounding (of the keys' biases) is measured by the others.
    """
    largest = {name: float(np.abs(x).max()) for name, x in wanted.items()}
    floor = 1e-3 * max(largest.values())
    differences = {name: float(np.abs(ours[name] - x).max()) for name, x in wanted.items()}
    relative = {name: x / max(largest[name], floor) for name, x in differences.items()}
    worst = max(relative, key=lambda name: relative[name])
    found = differences[worst], relative[worst]
    note = f"worst: {worst}"
    return Row("gradient of every parameter", peer, model, *found, STACK, note, is_small=True)


def _table(theirs: Record) -> names.Table:
    of_head = ("head", "head.codes_CE")
    if theirs.peer == "transformers":
        return {**names.TRANSFORMERS, **{name: names.FAIRSEQ[name] for name in of_head}}
    if theirs.peer == "torchaudio":
        outside = ("encoder.mask_embedding_D", *of_head)
        return names.within(names.TORCHAUDIO, "wav2vec2.", but=outside)
    return fairseq.table_for(theirs.model["conv_norm"], is_fine_tuned=False)


class _Ours:
    """Our model with the weights of a record, part by part; tensors go out under their names.

    The reference's codes have four specials before them, so labels are counted from the end.
    """

    def __init__(self, theirs: Record):
        self._record, self._table = theirs, _table(theirs)
        state = theirs.below("state")
        self._num_codes = len(state[self._table["head.codes_CE"]])
        config, head = HubertConfig(**theirs.model), heads.HeadConfig(**theirs.head)
        self._abstract = heads.abstract(config, head, (self._num_codes,))
        self._model = self._from_theirs(state)
        is_new = any(name.endswith(names.NEW_SPELLING[0]) for name in state)
        self._spelling = names.NEW_SPELLING if is_new else names.OLD_SPELLING

    def _from_theirs(self, state: Mapping[str, np.ndarray]) -> heads.Hubert:
        shapes = {name: x.shape for name, x in weights.to_named(self._abstract).items()}
        arrays = names.to_ours(state, shapes, self._table, origin=self._record.peer)
        return weights.from_named(self._abstract, jax.tree.map(jnp.asarray, arrays))

    def _to_theirs(self, model: heads.Hubert) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(x) for name, x in weights.to_named(model).items()}
        return names.to_theirs(arrays, self._table, spelling=self._spelling)

    def extract(self, wave_BS, num_samples_B=None):
        return _extract(self._model.encoder, wave_BS, num_samples_B)

    def project(self, conv_BTC):
        encoder = self._model.encoder
        return encoder.projection(encoder.projection_norm(jnp.asarray(conv_BTC)))

    def embed(self, conv_BTC, valid_BT=None):
        return _contextualize(self._model.encoder, jnp.asarray(conv_BTC), valid_BT, num_layers=0)

    def output(self, conv_BTC, valid_BT=None):
        return _contextualize(self._model.encoder, conv_BTC, valid_BT, num_layers=None)

    def layer(self, i: int, x_BTD, valid_BT=None):
        layer = jax.tree.map(lambda parameter: parameter[i], self._model.encoder.layers)
        return _layer(layer, jnp.asarray(x_BTD), valid_BT)

    def layers(self, conv_BTC, valid_BT=None) -> np.ndarray:
        """Inputs and outputs of all layers, (L + 1, B, T, D)."""
        seen = [self.embed(conv_BTC, valid_BT)]
        for i in range(self._model.encoder.config.num_layers):
            seen.append(self.layer(i, seen[-1], valid_BT))
        return np.stack(seen)

    def train(self, wave_BS):
        """logits (N, K), loss, penalty, and the gradients under the peer's names."""
        specials = self._num_codes - self._record.num_codes
        labels_BT = jnp.asarray(self._record.arrays["labels_BT"] + specials)
        mask_BT = jnp.asarray(self._record.arrays["mask_BT"])
        gradients, (logits_BTK, loss, penalty) = _train(self._model, wave_BS, labels_BT, mask_BT)
        return np.asarray(logits_BTK)[mask_BT], loss, penalty, self._to_theirs(gradients)

    def step(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The weights after one AdamW step, under the peer's names."""
        return self._to_theirs(_step(self._model, self._from_theirs(gradients)))


@jax.jit
def _extract(encoder, wave_BS, num_samples_B):
    return encoder.extract(wave_BS, num_samples_B=num_samples_B, padding="reference")


@functools.partial(jax.jit, static_argnames="num_layers")
def _contextualize(encoder, conv_BTC, valid_BT, *, num_layers):
    return encoder.contextualize(conv_BTC, valid_BT=valid_BT, num_layers=num_layers)


@jax.jit
def _layer(layer, x_BTD, valid_BT):
    return layer(x_BTD, valid_BT)


@functools.partial(jax.grad, has_aux=True)
def _loss(model, wave_BS, labels_BT, mask_BT):
    (logits_BTK,), penalty = model(wave_BS, mask_BT)
    found = losses.prediction(logits_BTK, labels_BT, mask_BT, jnp.ones(len(wave_BS)))
    loss = found.masked_loss / found.masked_frames + record.PENALTY * penalty
    return loss, (logits_BTK, loss, penalty)


_train = jax.jit(_loss)


@jax.jit
def _step(model, gradients):
    config = optim.OptimConfig(
        peak_lr=record.LEARNING_RATE, warmup_steps=1, beta1=record.BETAS[0],
        beta2=record.BETAS[1], eps=record.EPS, weight_decay=record.WEIGHT_DECAY, clip_norm=0.0,
    )  # fmt: skip
    optimizer = optim.adamw(config, num_steps=2)  # the first update is at the peak
    updates, _ = optimizer.update(gradients, optimizer.init(model), model)
    return optax.apply_updates(model, updates)
