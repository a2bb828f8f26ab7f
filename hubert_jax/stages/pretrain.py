# SPDX-License-Identifier: Apache-2.0
"""hubert pretrain: corpus and labels in, checkpoints out.

Reads WORK/corpus and the labels of one or more iterations, writes WORK/<iteration>/checkpoints
and WORK/<iteration>/logs. Started again, it goes on from the newest checkpoint, at the exact step.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from hubert_jax import checkpoints, logs, optim, sharding, train
from hubert_jax.data import arrays, batches, cards
from hubert_jax.data.corpus import Corpus
from hubert_jax.heads import HeadConfig, Hubert
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames, losses, masking


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int  # updates
    labels: tuple[str, ...]  # iterations of this work directory (or paths) to predict at once
    accumulate: int  # parts that a batch is worked off in, to save memory
    report_every: int  # steps
    validate_every: int  # steps


@dataclasses.dataclass(frozen=True)
class LossConfig:
    penalty: float  # on the extractor's output
    # Weight of the frames that are not masked, moving linearly over the run; the reference: 0, 0.
    unmasked_weight_start: float
    unmasked_weight_end: float


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains until train.num_steps, or says that it is done.

    Raises ValueError when labels, corpus and configuration do not belong together, and
    train.Interrupted after a signal, once the state is saved.
    """
    settings = TrainConfig(**config.train)
    corpus = Corpus(workdir / "corpus")
    label_folders = [_label_folder(workdir, name) for name in settings.labels]
    stores = {split: [arrays.Store(folder / split) for folder in label_folders] for split in
              ("train", "validation")}  # fmt: skip
    num_codes = _check_labels(stores, corpus)

    folder = workdir / config.iteration / "checkpoints"
    made_from = _made_from(config, corpus, stores["train"])
    started = cards.is_made(folder / "card.json", made_from)
    card = cards.new(
        "checkpoint",
        made_from=made_from,
        model=config.model.to_dict(),
        head=config.head.to_dict(),
        num_codes=num_codes,
    )
    if not started:
        cards.write(folder / "card.json", card)
    saved = checkpoints.Checkpoints(folder, checkpoints.CheckpointConfig(**config.checkpoints))
    try:
        if saved.latest_step == settings.num_steps:
            logs.info(f"{folder}: all {settings.num_steps} steps are done")
            return
        mesh = sharding.make_mesh(**config.mesh)
        with jax.set_mesh(mesh):
            _train(config, settings, mesh, corpus, stores, num_codes, saved, card, workdir)
    finally:
        saved.close()


def _train(config, settings, mesh, corpus, stores, num_codes, saved, card, workdir) -> None:
    model_config = HubertConfig(**config.model)
    optimizer = optim.adamw(optim.OptimConfig(**config.optim), num_steps=settings.num_steps)
    key = jax.random.key(config.seed)
    state = train.init_state(
        make_sharded(
            lambda key: Hubert(model_config, HeadConfig(**config.head), num_codes, key=key),
            jax.random.fold_in(key, 0),
            mesh,
        ),
        optimizer,
    )
    first_step = saved.latest_step or 0
    if first_step:
        state = saved.restore(state)

    batch_config = batches.BatchConfig(**config.batch)
    row_multiple = settings.accumulate * sharding.batch_ways(mesh)
    split = corpus.split("train")
    plan = batches.Plan(
        split.num_samples, batch_config, seed=config.seed, row_multiple=row_multiple
    )
    _describe(state, plan, split, settings, num_codes, first_step)
    stream = functools.partial(
        batches.stream,
        config=batch_config,
        normalize=model_config.normalize_audio,
        process=(jax.process_index(), jax.process_count()),
    )
    training = stream(
        split, stores["train"], plan, first_step=first_step, num_steps=settings.num_steps
    )
    validate = _Validation(
        corpus.split("validation"), stores["validation"], batch_config, row_multiple, stream,
        jax.random.fold_in(key, 1), mesh,
    )  # fmt: skip
    loss = functools.partial(
        pretraining_loss, config=LossConfig(**config.loss), num_steps=settings.num_steps
    )
    learning_rate = optim.schedule(
        optim.OptimConfig(**config.optim), num_steps=settings.num_steps
    )
    log_folder = workdir / config.iteration / "logs"
    title = f"pretrain {config.iteration}"
    with (
        logs.Metrics(log_folder, resume_from=first_step) as metrics,
        logs.Progress(title, settings.num_steps, "steps", done=first_step) as progress,
    ):

        def report(step, sums, seconds, waited):
            values = readable(sums) | {
                "learning_rate": float(learning_rate(step - 1)),
                "audio_seconds_per_second": sums["audio_seconds"][0] / seconds,
                "seconds_waited_for_data": waited,
            }
            metrics.write(step, {f"train/{name}": value for name, value in values.items()})
            progress.advance(step - progress.count, note=_one_line(values))

        def validation(state):
            values = validate(state)
            metrics.write(int(state.step), {f"validation/{n}": v for n, v in values.items()})
            logs.info(f"{title}: step {int(state.step)}, validation {_one_line(values)}")

        train.fit(
            state,
            train.make_step(loss, optimizer, accumulate=settings.accumulate),
            ((step, sharding.put_batch(mesh, batch)) for step, batch in training),
            key=jax.random.fold_in(key, 2),
            num_steps=settings.num_steps,
            report=report,
            report_every=settings.report_every,
            validate=validation,
            validate_every=settings.validate_every,
            save=lambda state: saved.save(state, card),
            save_every=saved.config.every,
        )


def make_sharded(make, key, mesh):
    """`make(key)`, a model, created with every parameter already where the mesh wants it."""
    shardings = sharding.param_shardings(mesh, jax.eval_shape(make, key))
    return jax.jit(make, out_shardings=shardings)(key)


def pretraining_loss(
    model: Hubert, batch, key, step, *, config: LossConfig, num_steps: int
) -> train.Loss:
    """Masked prediction of every label set plus the feature penalty, as sums (HUBERT.md).

    batch: audio (B, S), labels (B, T, G), weights B. `key` draws masks, dropout and layer drop.
    """
    mask_key, dropout_key = jax.random.split(key)
    start, end = config.unmasked_weight_start, config.unmasked_weight_end
    unmasked_weight = start + (end - start) * step / num_steps
    predictions, penalty = _predict(model, batch, mask_key, dropout_key)
    masked_loss = sum(p.masked_loss for p in predictions)
    unmasked_loss = sum(p.unmasked_loss for p in predictions)
    first = predictions[0]
    # The reference divides by the frames that count at all, not by their weights.
    weight = first.masked_frames + jnp.where(unmasked_weight > 0, first.unmasked_frames, 0.0)
    total = masked_loss + unmasked_weight * unmasked_loss + config.penalty * penalty * weight
    metrics = _metrics(predictions, penalty) | {
        "audio_seconds": (batch["audio"].size / frames.SAMPLE_RATE, 1.0),
        "unmasked_weight": (unmasked_weight * 1.0, 1.0),
    }
    return train.Loss(total, weight, metrics)


def _predict(model: Hubert, batch, mask_key, dropout_key):
    labels_BTG = batch["labels"]
    encoder = model.encoder.config
    mask_BT = masking.span_mask(
        mask_key, *labels_BTG.shape[:2], prob=encoder.mask_prob, length=encoder.mask_length
    )
    logits, penalty = model(batch["audio"], mask_BT, key=dropout_key)
    predictions = [
        losses.prediction(logits_BTC, labels_BTG[..., g], mask_BT, batch["weights"])
        for g, logits_BTC in enumerate(logits)
    ]
    return predictions, penalty


def _metrics(predictions: list[losses.Prediction], penalty) -> dict:
    """(sum, count) of what is logged; label sets after the first have their number in the name."""
    metrics = {"feature_penalty": (penalty, 1.0)}
    for g, p in enumerate(predictions):
        set_name = "" if g == 0 else f"_{g}"
        metrics |= {
            f"masked_loss{set_name}": (p.masked_loss, p.masked_frames),
            f"unmasked_loss{set_name}": (p.unmasked_loss, p.unmasked_frames),
            f"masked_accuracy{set_name}": (p.masked_correct, p.masked_frames),
            f"unmasked_accuracy{set_name}": (p.unmasked_correct, p.unmasked_frames),
            f"predicted_perplexity{set_name}": (p.predicted_perplexity, 1.0),
            f"label_perplexity{set_name}": (p.label_perplexity, 1.0),
        }
    first = predictions[0]
    metrics["masked_share"] = (first.masked_frames, first.masked_frames + first.unmasked_frames)
    return metrics


def readable(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Means of (sum, count) pairs."""
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


class _Validation:
    """Loss and accuracy on the validation split: always the same crops and the same masks."""

    def __init__(self, split, stores, config, row_multiple, stream, key, mesh):
        plan = batches.validation_batches(split.num_samples, config, row_multiple=row_multiple)
        self._stream = functools.partial(
            stream, split, stores, plan, first_step=0, num_steps=len(plan)
        )
        self._key, self._mesh = key, mesh
        self._evaluate = jax.jit(
            lambda model, batch, key: _metrics(*_predict(model, batch, key, None))
        )

    def __call__(self, state: train.State) -> dict[str, float]:
        metrics = []
        for number, batch in self._stream():
            batch = sharding.put_batch(self._mesh, batch)
            key = jax.random.fold_in(self._key, number)
            metrics.append(self._evaluate(state.model, batch, key))
        return readable(train.sum_metrics(jax.device_get(metrics)))


def _label_folder(workdir: epath.Path, name: str) -> epath.Path:
    inside = workdir / name / "labels"
    return inside if inside.exists() or "/" not in name else epath.Path(name)


def _check_labels(stores, corpus: Corpus) -> tuple[int, ...]:
    """Codes of every label set, once all of them are known to be of this corpus."""
    for store in (store for stores_of_split in stores.values() for store in stores_of_split):
        cards.require(
            store.folder / "card.json", store.card, corpus=corpus.card["fingerprint"], kind="labels"
        )
    for train_store, validation_store in zip(stores["train"], stores["validation"], strict=True):
        cards.require(
            validation_store.folder / "card.json",
            validation_store.card,
            codebook=train_store.card["codebook"],
        )
    return tuple(int(store.card["num_codes"]) for store in stores["train"])


def _made_from(config: ConfigDict, corpus: Corpus, stores) -> dict:
    """What decides the weights: everything but the mesh, the logging and the checkpoints' rhythm."""
    sections = ("model", "head", "loss", "optim")
    batch = batches.BatchConfig(**config.batch)
    return {
        **{section: config[section].to_dict() for section in sections},
        "batch": {name: config.batch[name] for name in batch.plan_fields},
        "seed": config.seed,
        "num_steps": config.train.num_steps,
        "accumulate": config.train.accumulate,
        "corpus": corpus.card["fingerprint"],
        "labels": [store.card["codebook"] for store in stores],
    }


def _describe(state, plan, split, settings, num_codes, first_step) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    hours = float(split.num_samples.sum()) / frames.SAMPLE_RATE / 3600
    rungs = ", ".join(
        f"{plan.rows(rung)} x {rung / frames.SAMPLE_RATE:.2f} s" for rung in plan.rungs
    )
    epochs = settings.num_steps / plan.batches_per_epoch
    expected = sum(math.log(codes) for codes in num_codes)
    logs.info(
        f"{parameters / 1e6:.2f} M parameters, {jax.device_count()} {jax.default_backend()}"
        f" devices; {len(split.ids)} utterances, {hours:.2f} h, {plan.num_dropped} too short,"
        f" {100 * plan.share_left_out:.1f} % of the audio cropped away or dropped\n"
        f"batches of {rungs}; {plan.batches_per_epoch} an epoch, {epochs:.1f} epochs;"
        f" the masked loss should start near ln K = {expected:.2f}"
        + (f"\ngoing on after step {first_step}" if first_step else "")
    )


def _one_line(values: dict[str, float]) -> str:
    parts = [
        f"masked loss {values['masked_loss']:.3f}",
        f"accuracy {values['masked_accuracy']:.3f} masked {values['unmasked_accuracy']:.3f} not",
    ]
    if "audio_seconds_per_second" in values:
        parts.append(f"{values['audio_seconds_per_second']:.0f} audio s/s")
    return ", ".join(parts)
