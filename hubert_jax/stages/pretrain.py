# SPDX-License-Identifier: Apache-2.0
"""hubert pretrain: corpus and labels in, checkpoints out.

Reads WORK/corpus and the labels of one or more iterations, writes WORK/<iteration>/checkpoints
and WORK/<iteration>/logs. Started again, it goes on from the newest checkpoint, at the exact step.

B batch, S samples, T frames, G label sets (clusterings)
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from hubert_jax import (
    checkpoints,
    logs,
    optim,
    pretraining,
    processes,
    sharding,
    stopping,
    train,
    watch,
)
from hubert_jax.data import arrays, batches, cards, codebooks
from hubert_jax.data.corpus import Corpus, Split
from hubert_jax.data.labels import check_range
from hubert_jax.heads import HeadConfig, Hubert
from hubert_jax.model import HubertConfig
from hubert_jax.ops import frames

SPLITS = ("train", "validation")
# What each key that is folded from the seed is for.
FOR_WEIGHTS, FOR_VALIDATION, FOR_TRAINING = range(3)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int  # updates
    labels: tuple[str, ...]  # to predict at once: iterations of this WORK, or folders of labels
    start_from: str  # a checkpoint to begin with, own or imported; empty: random weights
    start_head: str  # of that checkpoint: "kept", or "new" to predict other codes
    accumulate: int  # parts that a batch is worked off in, to save memory; masks are drawn by part
    report_every: int  # steps
    validate_every: int  # steps

    def __post_init__(self):
        if self.start_head not in ("kept", "new"):
            raise ValueError(f"train.start_head is {self.start_head!r}: use 'kept' or 'new'")


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains until train.num_steps, or says that it is done.

    Raises ValueError when labels, corpus and configuration do not belong together, and
    train.Interrupted after a signal, once the state is saved.
    """
    settings = TrainConfig(**config.train)
    corpus = Corpus(workdir / "corpus")
    labels = open_labels(workdir, settings.labels, corpus)
    num_codes = tuple(int(store.card["num_codes"]) for store in labels["train"])
    folder = workdir / config.iteration / "checkpoints"
    card = cards.new(
        "checkpoint",
        made_from=_made_from(config, corpus, labels["train"], folder),
        model=config.model.to_dict(),
        head=config.head.to_dict(),
        num_codes=num_codes,
    )
    cards.is_made(folder / "card.json", card["made_from"])

    saved = checkpoints.Checkpoints(folder, checkpoints.CheckpointConfig(**config.checkpoints))
    try:
        validate_first = _lacks_validation(
            settings, saved.latest_step or 0, workdir / config.iteration
        )
        if saved.latest_step == settings.num_steps:
            saved.finish()
            if not validate_first:
                logs.info(f"{folder}: done before, {settings.num_steps} steps")
                return
        mesh = sharding.make_mesh(**config.mesh)
        with jax.set_mesh(mesh), _interruptible(settings):
            _pretrain(config, mesh, corpus, labels, num_codes, saved, card, workdir, validate_first)
    finally:
        saved.close()


@contextlib.contextmanager
def _interruptible(settings: TrainConfig) -> Iterator[None]:
    """A signal after the last step is heeded when the last checkpoint is written, not before."""
    try:
        yield
    except stopping.Stop as stop:
        step = settings.num_steps
        raise train.Interrupted(f"stopped by {stop} after step {step}; it is saved") from None


def _pretrain(
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    corpus: Corpus,
    labels: dict[str, list[arrays.Store]],
    num_codes: tuple[int, ...],
    saved: checkpoints.Checkpoints,
    card: cards.Card,
    workdir: epath.Path,
    validate_first: bool,
) -> None:
    settings, model_config = TrainConfig(**config.train), HubertConfig(**config.model)
    optim_config, batch_config = (
        optim.OptimConfig(**config.optim),
        batches.BatchConfig(**config.batch),
    )
    key = jax.random.key(config.seed)

    def make(key):
        return Hubert(model_config, HeadConfig(**config.head), num_codes, key=key)

    model = sharding.make_sharded(make, jax.random.fold_in(key, FOR_WEIGHTS), mesh)
    if settings.start_from and not saved.latest_step:
        model = checkpoints.start(model, settings.start_from, head=settings.start_head)
    optimizer = optim.adamw(optim_config, num_steps=settings.num_steps)
    state = train.init_state(model, optimizer)
    first_step = saved.latest_step or 0
    if first_step:
        state = saved.restore(state)

    row_multiple = settings.accumulate * sharding.batch_ways(mesh)
    if batch_config.row_multiple % row_multiple:
        raise ValueError(
            f"batch.row_multiple is {batch_config.row_multiple}, but {sharding.batch_ways(mesh)}"
            f" devices x {settings.accumulate} parts share out {row_multiple} rows at least: start"
            f" with --config.batch.row_multiple={row_multiple}, or use fewer devices"
        )
    plans: dict[str, Any] = {
        "train": batches.Plan(
            corpus.split("train").num_samples, batch_config,
            seed=config.seed, row_multiple=row_multiple,
        ),
        "validation": batches.validation_batches(
            corpus.split("validation").num_samples, batch_config, row_multiple=row_multiple
        ),
    }  # fmt: skip

    def stream(
        split: str, first_step: int, num_steps: int
    ) -> Generator[tuple[int, Any], None, None]:
        loaded = batches.stream(
            corpus.split(split), labels[split], plans[split], batch_config,
            first_step=first_step, num_steps=num_steps, normalize=model_config.normalize_audio,
            parts=sharding.batch_parts(mesh),
        )  # fmt: skip
        with contextlib.closing(loaded):
            for step, batch in loaded:
                yield step, sharding.put_batch(mesh, batch)

    def shapes(sizes: Iterable[tuple[int, int]]) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Of batches of (rows, samples), where all are compiled at once."""
        if not stopping.compiles_at_once():
            return []
        return [
            pretraining.batch_shapes(
                mesh, rows=rows, num_samples=num_samples, num_label_sets=len(settings.labels)
            )
            for rows, num_samples in sizes
        ]

    loss = functools.partial(
        pretraining.loss, config=pretraining.LossConfig(**config.loss), num_steps=settings.num_steps
    )
    validate = pretraining.validation(
        lambda: stream("validation", 0, len(plans["validation"])),
        key=jax.random.fold_in(key, FOR_VALIDATION),
        ahead=shapes((len(batch.weights_B), batch.num_samples) for batch in plans["validation"]),
    )
    learning_rate = optim.schedule(optim_config, num_steps=settings.num_steps)
    # Now that everything fits: a refusal leaves nothing that the mended config would not match.
    if not (saved.folder / "card.json").exists() and processes.is_first():
        cards.write(saved.folder / "card.json", card)
    _describe(state, plans["train"], corpus, settings, num_codes, first_step)
    if stopping.compiles_at_once() and first_step < settings.num_steps:
        logs.info(f"lengths of rows to compile for, all at once: {len(plans['train'].rungs)}")

    title = f"pretrain {config.iteration}"
    with (
        stopping.listening(),
        logs.metrics(
            workdir / config.iteration / "logs",
            resume_from=first_step,
            is_kept=processes.is_first(),
        ) as metrics,
        logs.Progress(title, settings.num_steps, "steps", done=first_step) as progress,
        contextlib.closing(stream("train", first_step, settings.num_steps)) as loaded,
    ):
        watching = watch.Watch(
            title,
            utterances=lambda step: utterances(corpus.split("train"), plans["train"], step),
            checkpoint=lambda: newest(saved),
        )

        def report(step: int, sums: train.Sums, seconds: float, waited: float) -> None:
            values = train.means(sums) | {
                "learning_rate": float(learning_rate(step - 1)),
                "audio_seconds_per_second": sums["audio_seconds"][0] / seconds,
                "seconds": seconds,
                "seconds_waited_for_data": waited,
            }
            metrics.write(step, {f"train/{name}": value for name, value in values.items()})
            progress.advance(step - progress.count, note=_one_line(values))
            if step > optim_config.warmup_steps:
                watching.say(step, watch.of_training(values))

        def report_validation(state: train.State) -> None:
            step, values = int(state.step), validate(state.model)
            metrics.write(step, {f"validation/{name}": x for name, x in values.items()})
            logs.info(f"{title}: step {step}, validation {_one_line(values)}")
            if step > optim_config.warmup_steps:
                watching.say(step, watch.of_validation(values))

        train.fit(
            state,
            stopping.interruptible(
                train.make_step(loss, optimizer, accumulate=settings.accumulate),
                shapes((plans["train"].rows(rung), rung) for rung in plans["train"].rungs),
            ),
            loaded,
            key=jax.random.fold_in(key, FOR_TRAINING),
            num_steps=settings.num_steps,
            report=report,
            report_every=settings.report_every,
            validate=report_validation,
            validate_every=settings.validate_every,
            save=lambda state: saved.save(state, card),
            save_every=saved.config.every,
            watch=watching.step,
            validate_first=validate_first,
        )
        saved.wait()


def _lacks_validation(settings: TrainConfig, step: int, folder: epath.Path) -> bool:
    """Whether the metrics that are kept lack the validation after `step`: it was stopped."""
    is_due = train.is_validated_after(
        step, every=settings.validate_every, num_steps=settings.num_steps
    )
    path = folder / "logs" / "metrics.jsonl"
    lacks = False
    if step and is_due and path.exists():
        try:
            lines = logs.read_metrics(path)
        except ValueError:  # said where training goes on, which writes there
            lines = [{"step": step, "validation/masked_loss": math.nan}]
        lacks = not any(line["step"] == step and "validation/masked_loss" in line for line in lines)
    return not processes.agree([lacks]) or lacks


def utterances(split: Split, plan: batches.Plan, step: int) -> list[str]:
    """The ids in the batch of update number `step`."""
    return [split.ids[n] for n in plan[step - 1].utterances_B.tolist()]


def newest(saved: checkpoints.Checkpoints) -> str:
    """The newest checkpoint, in words."""
    step = saved.latest_step
    return "no checkpoint was saved yet" if step is None else str(saved.folder / str(step))


def open_labels(
    workdir: epath.Path, names: tuple[str, ...], corpus: Corpus
) -> dict[str, list[arrays.Store]]:
    """The label sets `names` of both splits, once they are known to be of this corpus.

    Raises ValueError when labels are of another corpus or codebook, or are no codes of it.
    """
    folders = [epath.Path(name) if "/" in name else workdir / name / "labels" for name in names]
    opened = {split: [arrays.Store(folder / split) for folder in folders] for split in SPLITS}
    for train_store, validation_store in zip(*opened.values(), strict=True):
        path, card = train_store.folder / "card.json", train_store.card
        codebook = train_store.folder.parent.parent / "codebook.npz"
        if codebook.exists():  # labels may have been brought here without it
            cards.require(path, card, codebook=cards.digest(codebook))
            cards.require(path, card, num_codes=len(codebooks.read_centers(codebook)))
        for store in (train_store, validation_store):
            cards.require(
                store.folder / "card.json", store.card,
                kind="labels", corpus=corpus.card["fingerprint"], codebook=card["codebook"],
                num_codes=card["num_codes"],
            )  # fmt: skip
            store.check()
            check_range(store)
    return opened


def _made_from(
    config: ConfigDict, corpus: Corpus, stores: list[arrays.Store], folder: epath.Path
) -> dict[str, Any]:
    """What decides the weights: everything but mesh, logging and the rhythm of checkpoints."""
    batch = batches.BatchConfig(**config.batch)
    return {
        **{section: config[section].to_dict() for section in ("model", "head", "loss", "optim")},
        "batch": {name: config.batch[name] for name in batch.plan_fields},
        "seed": config.seed,
        "num_steps": config.train.num_steps,
        "accumulate": config.train.accumulate,
        "corpus": corpus.card["fingerprint"],
        "labels": [store.card["codebook"] for store in stores],
        **_started(config.train, folder),
    }


def _started(train_config: ConfigDict, folder: epath.Path) -> dict[str, Any]:
    """What training started from; nothing where the weights were random.

    It is looked at once, when training begins: to go on, it need no longer be there.
    """
    path, head = train_config.start_from, train_config.start_head
    if not path:
        return {}
    own = folder / "card.json"
    recorded = cards.read(own)["made_from"].get("start", {}) if own.exists() else {}
    if recorded.get("path") == path:
        return {"start": recorded | {"head": head}}
    card = checkpoints.read_card(path)
    facts = {"made_from": card["made_from"], "step": card["step"]}
    return {"start": {**facts, "path": recorded.get("path", path), "head": head}}


def _describe(
    state: train.State,
    plan: batches.Plan,
    corpus: Corpus,
    settings: TrainConfig,
    num_codes: tuple[int, ...],
    first_step: int,
) -> None:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    split = corpus.split("train")
    hours = float(split.num_samples.sum()) / frames.SAMPLE_RATE / 3600
    rungs = ", ".join(
        f"{plan.rows(rung)} x {rung / frames.SAMPLE_RATE:.2f} s" for rung in plan.rungs
    )
    epochs = settings.num_steps / plan.batches_per_epoch
    logs.info(
        f"{parameters / 1e6:.2f} M parameters on {jax.device_count()} {jax.default_backend()}"
        f" device(s); {len(split.ids)} utterances, {hours:.2f} h, {plan.num_dropped} too short,"
        f" {100 * plan.share_left_out:.1f} % of the audio of an epoch cropped away"
    )
    logs.info(
        f"batches of {rungs}; {plan.batches_per_epoch} an epoch, {epochs:.1f} epochs; the masked"
        f" loss starts near ln K = {sum(math.log(codes) for codes in num_codes):.2f}"
    )
    if first_step:
        logs.info(f"going on after step {first_step}")


def _one_line(values: dict[str, float]) -> str:
    line = (
        f"masked loss {values['masked_loss']:.3f}, accuracy {values['masked_accuracy']:.3f} masked"
        f" {values['unmasked_accuracy']:.3f} unmasked"
    )
    if "audio_seconds_per_second" in values:
        line += f", {values['audio_seconds_per_second']:.0f} audio s/s"
        line += f", {values['seconds_waited_for_data']:.2f} s waited for data"
    return line
