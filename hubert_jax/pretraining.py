# SPDX-License-Identifier: Apache-2.0
"""The loss of pretraining: masks are drawn, codes predicted behind them, the features kept small;
and the means of what is said of it on a validation set.

B batch, S samples, T frames, D width, G label sets (clusterings), C codes of one
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from hubert_jax import sharding, stopping, train, watch
from hubert_jax.heads import Hubert
from hubert_jax.ops import frames, losses, masking


@dataclasses.dataclass(frozen=True)
class LossConfig:
    penalty: float  # on the extractor's output
    # Weight of the frames that are not masked, moving linearly over the run; the reference: 0, 0.
    unmasked_weight_start: float
    unmasked_weight_end: float


def loss(model: Hubert, batch, key, step, *, config: LossConfig, num_steps: int) -> train.Loss:
    """Masked prediction of every label set plus the feature penalty, as sums.

    batch: audio (B, S), labels (B, T, G), weights B. `key` draws masks, dropout and layer drop.
    Source: fairseq's hubert_criterion, which divides by the frames that count at all and not by
    their weights.
    """
    mask_key, dropout_key = jax.random.split(key)
    start, end = config.unmasked_weight_start, config.unmasked_weight_end
    unmasked_weight = start + (end - start) * step / num_steps
    predictions, penalty = predict(model, batch, mask_key, dropout_key)
    first = predictions[0]
    weight = first.masked_frames + jnp.where(unmasked_weight > 0, first.unmasked_frames, 0.0)
    total = (
        sum(p.masked_loss for p in predictions)
        + unmasked_weight * sum(p.unmasked_loss for p in predictions)
        + config.penalty * penalty * weight
    )
    metrics = summary(predictions, penalty) | {
        "audio_seconds": (batch["audio"].size / frames.SAMPLE_RATE, 1.0),
        "unmasked_weight": (jnp.float32(unmasked_weight), 1.0),
    }
    return train.Loss(total, weight, metrics)


def batch_shapes(
    mesh: Mesh | AbstractMesh, *, rows: int, num_samples: int, num_label_sets: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch without arrays, for what is compiled before there is one."""
    where, num_frames = sharding.batch_sharding(mesh), frames.num_frames(num_samples)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "audio": ((rows, num_samples), jnp.float32),
        "labels": ((rows, num_frames, num_label_sets), jnp.int32),
        "weights": ((rows,), jnp.float32),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for name, (shape, dtype) in shapes.items()
    }


def predict(
    model: Hubert, batch, mask_key, dropout_key
) -> tuple[list[losses.Prediction], jax.Array]:
    """The sums of every label set, and the feature penalty."""
    mask_BT = _mask(model, batch, mask_key)
    logits, penalty = model(batch["audio"], mask_BT, key=dropout_key)
    return _predictions(logits, mask_BT, batch), penalty


class Usage(NamedTuple):
    """How the codes of one label set are used on the frames of a batch; counts add up."""

    labelled_C: jax.Array  # frames that have the code
    predicted_C: jax.Array  # frames for which it is the likeliest
    spread: jax.Array  # of the logits over frames, mean over codes; 0: all frames look the same


def evaluate(model: Hubert, batch, mask_key) -> tuple[dict[str, tuple], list[Usage]]:
    """What `summary` says of a batch, and for each label set how its codes are used.

    Among the former `feature_spread`: `losses.spread` of the features, of frames without a mask.
    """
    mask_BT = _mask(model, batch, mask_key)
    x_BTD, penalty = model.encode(batch["audio"], mask_BT)
    assert model.head is not None
    logits = model.head(x_BTD)
    weights_BT = jnp.broadcast_to(batch["weights"][:, None], mask_BT.shape)
    usages = []
    for g, logits_BTC in enumerate(logits):
        num_codes = logits_BTC.shape[-1]
        labelled_C, predicted_C = (
            jnp.zeros(num_codes).at[codes_BT].add(weights_BT)
            for codes_BT in (batch["labels"][..., g], jnp.argmax(logits_BTC, axis=-1))
        )
        logit_spread = jnp.mean(jnp.std(logits_BTC, axis=(0, 1)))
        usages.append(Usage(labelled_C, predicted_C, logit_spread))
    metrics = summary(_predictions(logits, mask_BT, batch), penalty)
    counts_BT = weights_BT * ~mask_BT
    num_counted = jnp.sum(counts_BT)
    spread = (losses.spread(x_BTD, counts_BT) * num_counted, num_counted)
    return metrics | {"feature_spread": spread}, usages


def validation(
    stream: Callable[[], Generator[tuple[int, Any], None, None]],
    *,
    key,
    ahead: Sequence[Any] = (),
):
    """A function from a model to its means on `stream()`: the same crops and masks every time.

    It heeds signals between batches (raises stopping.Stop). `ahead` as for stopping.interruptible.
    """

    compiled = stopping.interruptible(jax.jit(evaluate), ahead)

    def validate(model: Hubert) -> dict[str, float]:
        found: list[Any] = []
        with contextlib.closing(stream()) as loaded:
            for n, batch in loaded:
                jax.block_until_ready(found[-2:-1])  # two at a time, not all that is left
                stopping.heed()
                found.append(compiled(model, batch, jax.random.fold_in(key, n)))
        sums, usages = zip(*jax.device_get(found), strict=True)
        return train.means(train.sum_metrics(list(sums))) | watch.usage(list(usages))

    return validate


def _mask(model: Hubert, batch, key) -> jax.Array:
    config = model.encoder.config
    shape_BT = batch["labels"].shape[:2]
    return masking.span_mask(key, *shape_BT, prob=config.mask_prob, length=config.mask_length)


def _predictions(logits: list[jax.Array], mask_BT, batch) -> list[losses.Prediction]:
    return [
        losses.prediction(logits_BTC, batch["labels"][..., g], mask_BT, batch["weights"])
        for g, logits_BTC in enumerate(logits)
    ]


def summary(predictions: list[losses.Prediction], penalty: jax.Array) -> dict[str, tuple]:
    """(sum, count) of what is logged; label sets after the first have their number in the name."""
    metrics: dict[str, tuple] = {"feature_penalty": (penalty, 1.0)}
    for g, p in enumerate(predictions):
        suffix = "" if g == 0 else f"_{g}"
        metrics |= {
            f"masked_loss{suffix}": (p.masked_loss, p.masked_frames),
            f"unmasked_loss{suffix}": (p.unmasked_loss, p.unmasked_frames),
            f"masked_accuracy{suffix}": (p.masked_correct, p.masked_frames),
            f"unmasked_accuracy{suffix}": (p.unmasked_correct, p.unmasked_frames),
            f"predicted_perplexity{suffix}": (p.predicted_perplexity, 1.0),
            f"label_perplexity{suffix}": (p.label_perplexity, 1.0),
        }
    first = predictions[0]
    metrics["masked_share"] = (first.masked_frames, first.masked_frames + first.unmasked_frames)
    return metrics
