# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk, by Orbax: <folder>/<step>/{params, optimizer, card}.

Items are flat dictionaries from dotted names to arrays (weights.py), so that any Orbax can restore
them without this package; the card says which model they belong to, and has checksums of them.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from hubert_jax import processes, sharding, weights
from hubert_jax.data import cards, places
from hubert_jax.heads import Hubert, Weights
from hubert_jax.model import Encoder
from hubert_jax.train import State

# Fields of a model's config that no shape shows and that change what it computes.
COMPUTES = ("conv_norm", "pre_norm", "num_heads", "position_groups", "normalize_audio")

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not finished
FULL = ("No space left on device", "Disk quota exceeded")  # in the words of whoever writes


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int  # steps between checkpoints
    keep_last: int  # how many of the newest stay
    keep_every: int  # checkpoints of steps divisible by this stay for ever; 0: none

    def __post_init__(self):
        for name, least in {"every": 1, "keep_last": 1, "keep_every": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"checkpoints.{name} is {value!r}: an integer from {least} on")


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Does not ask jax, which counts such calls: they are those of stopping.heed alone."""
        return False


class Checkpoints:
    """The checkpoints of one run: saved asynchronously, restored onto any mesh."""

    def __init__(self, folder, config: CheckpointConfig):
        self.folder = epath.Path(folder)
        self.config = config
        _remove_unfinished(self.folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
            enable_async_checkpointing=True,
        )
        self._manager = _Manager(places.absolute(self.folder), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: State, card: dict) -> None:
        """Starts writing `state` under its step; returns as soon as the arrays are copied."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        params, optimizer = weights.to_named(state.model), weights.to_named(state.opt_state)
        sums = {"params": weights.checksums(params), "optimizer": weights.checksums(optimizer)}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            card=ocp.args.JsonSave(
                card | {"step": step, "checksums": sums, "kept": dataclasses.asdict(self.config)}
            ),
        )
        with enough_space(self.folder):  # the failure of an earlier save shows here too
            self._manager.save(step, args=items)

    def restore(self, state: State) -> State:
        """The newest checkpoint, laid out as the arrays of `state` are.

        Raises ValueError when the checkpoint is of another shape, or damaged.
        """
        step = resolve(self.folder)
        card = read_card(step)
        return State(
            step=jax.numpy.full_like(state.step, int(step.name)),
            model=_restore(step, "params", state.model, card),
            opt_state=_restore(step, "optimizer", state.opt_state, card),
        )

    def finish(self) -> None:
        """Removes what a run that was killed at its very end had no time to remove.

        That is what the newest checkpoint replaced, by the rule of the run that saved it.
        """
        card = read_card(self.folder)
        if "kept" not in card:  # one of 0.2.0
            return
        rule = _rule(resolve(self.folder), card["kept"])
        processes.wait("checkpoints listed")  # by all, before the first is removed
        for step in sorted(self._manager.all_steps())[: -rule.keep_last]:
            if not rule.keep_every or step % rule.keep_every:
                self._manager.delete(step)

    def wait(self) -> None:
        """Until everything is on disk."""
        with enough_space(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with enough_space(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()


def _remove_unfinished(folder: epath.Path) -> None:
    """What a run that was killed in the middle of a save has left."""
    if processes.is_first() and folder.is_dir():
        for path in folder.iterdir():
            if UNFINISHED in path.name:
                path.rmtree()
    processes.wait("checkpoints")


@contextlib.contextmanager
def enough_space(folder: epath.Path) -> Iterator[None]:
    """Says in words that the disk is full: tensorstore says it in ten lines, and where Orbax writes
    a file of its own the system's error names none.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if not any(reason in str(error) for reason in FULL):
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left writing a checkpoint to {folder}; free some and run the same command"
            " again: earlier checkpoints are whole",
        ) from error


def _rule(step: epath.Path, kept: Any) -> CheckpointConfig:
    """By which a run kept its checkpoints, from the card of one of them."""
    try:
        return CheckpointConfig(**kept)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{step / 'card'}: kept is {kept!r}, which is no rule that a run had ({error}); the"
            " checkpoint itself is whole: write it as in the card of another step"
        ) from error


def _restore(step: epath.Path, item: str, like, card: dict):
    """The arrays of an item in the tree and with the shardings of `like`, checked by the card."""
    path = step / item
    with ocp.StandardCheckpointer() as checkpointer:
        with readable(step):
            stored = checkpointer.metadata(path).item_metadata.tree
        try:
            weights.from_named(like, stored)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; it was trained with another config") from error
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in weights.to_named(like).items()
        }
        with readable(step):
            arrays = checkpointer.restore(path, target)
    wanted = card.get("checksums", {}).get(item)  # absent in those of 0.1.0
    if wanted is not None:
        found = weights.checksums(arrays)
        changed = sorted(name for name, value in found.items() if wanted.get(name) != value)
        if changed:
            raise _damaged(step, f"{item}: {', '.join(changed[:4])} changed since it was saved")
    return weights.from_named(like, arrays)


@contextlib.contextmanager
def readable(step: epath.Path) -> Iterator[None]:
    """Whatever Orbax and tensorstore say of files that they cannot read, said in words.

    Their errors are of any class, bare Exception among them. A lack of memory, or of permission, is
    no damage.
    """
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise _damaged(step, f"{type(error).__name__}: {reason}") from error


def _damaged(step: epath.Path, reason: str) -> ValueError:
    return ValueError(
        f"{step}: the checkpoint is damaged ({reason}); remove this folder, and the same command"
        " goes on from the checkpoint before it, or begins anew"
    )


def resolve(path) -> epath.Path:
    """The step folder that `path` means: itself, or the newest in a folder of checkpoints.

    A step that a killed run left half written in a bucket has its name already, and does not count.
    Raises FileNotFoundError when there is none.
    """
    path = epath.Path(path)
    if (path / "params").exists():
        return places.absolute(path)
    named = [p for p in path.iterdir() if p.name.isdigit()] if path.is_dir() else []
    steps = [step for step in named if ocp.utils.is_checkpoint_finalized(step)]
    if named and not steps:
        raise FileNotFoundError(
            f"{path}: no step here has the commit_success.txt with which Orbax ends writing to a"
            f" bucket; if they were copied here whole, give one of them, such as {named[0]}"
        )
    if not steps:
        raise FileNotFoundError(
            f"{path}: no checkpoint here; give a folder such as WORK/it1/checkpoints or one step"
            " in it, or run hubert pretrain first"
        )
    return places.absolute(max(steps, key=lambda step: int(step.name)))


def read_card(path) -> dict:
    """The card of a checkpoint: its configs, codes and labels, and the step."""
    step = resolve(path)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer, readable(step):
        card = checkpointer.restore(step / "card")
    cards.check(step / "card", card)
    for part in ("model", "head"):  # which no array shows in all their fields
        made_from = card.get("made_from", {}).get(part)  # absent where it was imported
        difference = made_from and cards.first_difference(card.get(part), made_from)
        if difference:
            field, found, made = difference
            reason = f"card: {part}.{field} is {found!r}, it was trained with {made!r}"
            raise _damaged(step, reason)
    return card


def load_model(path) -> tuple[Hubert, dict]:
    """A model on the default device, with its card. `path` as in `resolve`."""
    path = resolve(path)
    card = read_card(path)
    model = Weights.from_card(card, {}).abstract()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), model)
    return _restore(path, "params", like, card), card


def load_encoder(path) -> tuple[Encoder, dict]:
    """The encoder of a model, with its card. `path` as in `resolve`."""
    model, card = load_model(path)
    return model.encoder, card


def load_weights(path) -> tuple[Weights, dict]:
    """A model as numpy arrays, with its card. `path` as in `resolve`."""
    model, card = load_model(path)
    arrays = {name: np.asarray(array) for name, array in weights.to_named(model).items()}
    return Weights.from_card(card, arrays), card


def start(model: Hubert, path, *, head: str) -> Hubert:
    """`model` with the encoder of a checkpoint, and with its head too where `head` is "kept".

    Raises ValueError naming the field or the arrays in which they differ.
    """
    found, _ = load_weights(path)
    theirs, ours = found.facts()["model"], dataclasses.asdict(model.encoder.config)
    for field in COMPUTES:
        if theirs[field] != ours[field]:
            raise ValueError(
                f"{path}: its model.{field} is {theirs[field]!r}, the config has {ours[field]!r}:"
                f" train with --config.model.{field}={theirs[field]}"
            )
    if head == "kept":
        assert model.head is not None
        if found.head is None:
            raise ValueError(f"{path}: has no code prediction; give --config.train.start_head=new")
        if found.num_codes != model.head.num_codes:  # also where they are as many together
            raise ValueError(
                f"{path}: its head predicts {found.num_codes} codes, the labels have"
                f" {model.head.num_codes}: --config.train.start_head=new starts with a new head"
            )
        temperature = found.head.temperature
        if temperature != model.head.config.temperature:
            raise ValueError(
                f"{path}: its head.temperature is {temperature}, the config has"
                f" {model.head.config.temperature}: train with"
                f" --config.head.temperature={temperature}"
            )
    own = weights.to_named(model)
    taken = ("encoder.",) if head == "new" else ("encoder.", "head.")
    arrays = {name: x for name, x in found.arrays.items() if name.startswith(taken)}
    try:
        weights.from_named(model, {**own, **arrays})
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; where only its head differs, --config.train.start_head=new starts"
            " with a new one"
        ) from error
    placed = {name: sharding.place(x, own[name].sharding) for name, x in arrays.items()}
    return weights.from_named(model, own | placed)


def write_weights(folder: epath.Path, model: Weights, card: dict) -> None:
    """A folder of checkpoints with one in it, step 0, which has no state of an optimiser.

    Raises ValueError when the folder has a checkpoint that was made from something else.
    """
    folder = epath.Path(folder)
    _remove_unfinished(folder)
    with enough_space(folder), ocp.CheckpointManager(places.absolute(folder)) as manager:
        if manager.latest_step() is not None:
            cards.require(folder / "card.json", read_card(folder), made_from=card["made_from"])
            return
        sums = {"params": weights.checksums(model.arrays)}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(dict(model.arrays)),
            card=ocp.args.JsonSave(card | {"step": 0, "checksums": sums}),
        )
        manager.save(0, args=items)
        manager.wait_until_finished()
