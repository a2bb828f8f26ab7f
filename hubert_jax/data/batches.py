# SPDX-License-Identifier: Apache-2.0
"""The batch plan, a pure function of (lengths, config, seed, step), and the loading of its batches.

No padding: every utterance is cropped to a rung of a short ladder of lengths, and a batch holds one
rung. Batch number = global step, and every process loads its rows of it, so the whole data state of
a run is the step: it resumes exactly, on any number of processes.

N utterances, B rows of a batch, S samples, T frames, G label sets
"""

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np
from absl import flags

from hubert_jax.data import arrays, rungs, workers
from hubert_jax.ops import frames


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    seconds: float  # audio of one global batch, at most: every rung has as many rows as fit
    min_seconds: float  # shorter utterances are dropped
    max_seconds: float  # longer ones are cropped to this
    num_rungs: int  # at most so many crop lengths (XLA compiles each once)
    rungs: tuple[float, ...]  # seconds, rising; () = fitted to the lengths of the corpus
    # Rows are a multiple of this, so the plan stays the same on every number of devices (times
    # accumulation) that divides it.
    row_multiple: int
    num_workers: int  # processes that load ahead; 0 = threads of this one
    num_threads: int  # that load ahead in this process (num_workers = 0)
    read_ahead: int  # batches loaded ahead

    @property
    def plan_fields(self) -> tuple[str, ...]:
        """The fields that decide what is in a batch; the others only how it is loaded."""
        return tuple(
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("num_workers", "num_threads", "read_ahead")
        )


class Batch(NamedTuple):
    """Which crops one global batch holds: num_samples from frame first_frames_B of utterances_B."""

    utterances_B: np.ndarray  # int64 positions in the split
    first_frames_B: np.ndarray  # int64
    weights_B: np.ndarray  # float32: 1, or 0 for a row that only fills a validation batch up
    num_samples: int  # the rung

    @property
    def num_frames(self) -> int:
        return frames.num_frames(self.num_samples)


class Plan:
    """The batches of training: `plan[step]`, each epoch every utterance at least once.

    >>> plan = Plan(split.num_samples, config, seed=0, row_multiple=8)
    >>> plan[123_456].utterances_B

    Utterances are shuffled within their rung, and the batches of all rungs among each other. What
    is left of a rung moves on to the next shorter one (this decides nothing but the crop), and the
    last batch of the shortest rung is topped up with repeats: so an epoch always has
    `batches_per_epoch` batches. Crops start anywhere on the 320-sample grid of the frames.
    """

    def __init__(
        self, num_samples_N: np.ndarray, config: BatchConfig, *, seed: int, row_multiple: int
    ):
        self._seed = seed
        self._layout = _lay_out(num_samples_N, config, row_multiple)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    @property
    def rungs(self) -> tuple[int, ...]:
        """Crop lengths in use, in samples, shortest first."""
        return tuple(int(rung) for rung in self._layout.rungs_R)

    def rows(self, rung: int) -> int:
        """Rows of a global batch of this crop length."""
        return int(self._layout.rows_R[self.rungs.index(rung)])

    def num_batches(self, rung: int) -> int:
        """Batches of this crop length in an epoch."""
        return int((self._layout.batch_rungs == self.rungs.index(rung)).sum())

    @property
    def batches_per_epoch(self) -> int:
        return len(self._layout.first_slots)

    @property
    def num_dropped(self) -> int:
        """Utterances shorter than min_seconds, or than the shortest of the rungs asked for."""
        return self._layout.num_dropped

    @property
    def share_left_out(self) -> float:
        """The share of the audio that an epoch does not see: cropped away or dropped."""
        return self._layout.share_left_out

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.batches_per_epoch)
        slots, first_frames, order = self._epoch(epoch)
        return _batch(self._layout, int(order[place]), slots, first_frames)

    def _epoch(self, epoch: int) -> "_Epoch":
        with self._lock:  # reading threads meet a new epoch together; one makes it
            if epoch not in self._epochs:
                # Readers are in one epoch or, around its end, in two.
                self._epochs = {e: made for e, made in self._epochs.items() if e == epoch - 1}
                self._epochs[epoch] = _shuffle(self._layout, self._seed, epoch)
            return self._epochs[epoch]

    def __getstate__(self):
        return {"_seed": self._seed, "_layout": self._layout}

    def __setstate__(self, state):
        self.__dict__.update(state, _epochs={}, _lock=threading.Lock())


def validation_batches(
    num_samples_N: np.ndarray, config: BatchConfig, *, row_multiple: int
) -> list[Batch]:
    """Every utterance of at least min_seconds once, cropped from its start, always the same.

    The last batch is filled up with rows of weight 0.
    """
    layout = _lay_out(num_samples_N, config, row_multiple)
    order = np.argsort(-layout.rung_N, kind="stable")
    slots = np.concatenate([order, np.resize(order, layout.num_repeats)])
    weights = (np.arange(len(slots)) < len(order)).astype(np.float32)
    batches = []
    for number, first in enumerate(layout.first_slots):
        batch = _batch(layout, number, slots, np.zeros_like(slots))
        rows = slice(first, first + len(batch.weights_B))
        batches.append(batch._replace(weights_B=weights[rows]))
    return batches


class Split(Protocol):
    """What loading needs of a corpus' split."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def num_samples(self) -> np.ndarray: ...

    def audio(self, position: int, start: int = 0, stop: int | None = None) -> np.ndarray: ...


def load(
    split: Split,
    labels: Sequence[arrays.Store],
    batch: Batch,
    rows: np.ndarray | slice,
    *,
    normalize: bool,
) -> dict[str, np.ndarray]:
    """`rows` of a batch: audio float32 (B, S), labels int32 (B, T, G), weights float32 B.

    `normalize`: each whole utterance to zero mean and unit variance, before cropping (as large and
    xlarge want it). Raises ValueError where audio or labels are not as long as the corpus says.
    """
    num_rows = len(batch.utterances_B[rows])
    audio_BS = np.empty((num_rows, batch.num_samples), np.float32)
    labels_BTG = np.empty((num_rows, batch.num_frames, len(labels)), np.int32)
    crops = zip(batch.utterances_B[rows].tolist(), batch.first_frames_B[rows].tolist(), strict=True)
    for row, (utterance, first_frame) in enumerate(crops):
        audio_BS[row] = _crop(split, utterance, first_frame, batch.num_samples, normalize)
        id_, num_samples = split.ids[utterance], int(split.num_samples[utterance])
        for label_set, store in enumerate(labels):
            labels_S = store[id_]
            _check_length(store, id_, len(labels_S), num_samples)
            places_T = frames.label_positions(
                batch.num_frames, first_frame=first_frame, label_rate=store.card["rate"]
            )
            labels_BTG[row, :, label_set] = labels_S[places_T]
    return {"audio": audio_BS, "labels": labels_BTG, "weights": batch.weights_B[rows]}


def stream(
    split: Split,
    labels: Sequence[arrays.Store],
    plan: Plan | Sequence[Batch],
    config: BatchConfig,
    *,
    first_step: int,
    num_steps: int,
    normalize: bool,
    parts: tuple[Sequence[int], int] = ((0,), 1),
) -> Generator[tuple[int, dict[str, np.ndarray]], None, None]:
    """Yields (step, what `load` gives) for the steps from `first_step` up to `num_steps`.

    Batches are loaded ahead. `parts` = (held, count): of `count` equal runs of a batch's rows, this
    process gets those numbered in `held`. Close the generator to stop the readers early.
    """
    for store in labels:
        check_labels(split, store)
    step_of = functools.partial(_load_step, split, tuple(labels), plan, parts, normalize)
    steps = grain.MapDataset.range(first_step, num_steps).map(step_of)
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # the workers are handed grain's flags
            flags.FLAGS.mark_as_parsed()
        ahead = math.ceil(config.read_ahead / config.num_workers)
        loaded = steps.to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        ).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=ahead
            ),
            worker_init_fn=workers.serve,
        )
    else:
        loaded = steps.to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.num_threads, prefetch_buffer_size=config.read_ahead
            )
        )
    iterator = iter(loaded)
    try:
        with workers.shielded() if config.num_workers else contextlib.nullcontext():
            first = next(iterator, None)  # the loaders start
        if first is not None:
            yield first
        yield from iterator
    finally:
        iterator.close()


def _load_step(
    split: Split,
    labels: Sequence[arrays.Store],
    plan: Plan | Sequence[Batch],
    parts: tuple[Sequence[int], int],
    normalize: bool,
    step: int,
) -> tuple[int, dict[str, np.ndarray]]:
    batch, (held, count) = plan[step], parts
    num_rows, rest = divmod(len(batch.utterances_B), count)
    if rest:
        raise ValueError(
            f"{len(batch.utterances_B)} rows of batch {step} do not divide into {count} parts;"
            " row_multiple has to be a multiple of these"
        )
    rows = np.concatenate([np.arange(part * num_rows, (part + 1) * num_rows) for part in held])
    return step, load(split, labels, batch, rows, normalize=normalize)


def check_labels(split: Split, store: arrays.Store) -> None:
    """Raises ValueError unless the store has labels of the right number for every utterance."""
    found = dict(zip(store.ids, store.lengths.tolist(), strict=True))
    for id_, num_samples in zip(split.ids, split.num_samples.tolist(), strict=True):
        if id_ not in found:
            raise ValueError(
                f"{store.folder}: no labels for utterance {id_!r}; they were made from another"
                f" corpus: remove {store.folder} and run hubert label again"
            )
        _check_length(store, id_, found[id_], num_samples)


def _check_length(store: arrays.Store, id_: str, num_labels: int, num_samples: int) -> None:
    rate = store.card["rate"]
    if rate not in (frames.FRAME_RATE, frames.SAMPLE_RATE // frames.MFCC_HOP):
        raise ValueError(
            f"{store.folder}: card.json has rate {rate!r}; labels come at 50 or 100 Hz"
        )
    want = frames.num_frames(num_samples, hop=frames.SAMPLE_RATE // rate)
    if num_labels != want:
        raise ValueError(
            f"{store.folder}: utterance {id_!r} has {num_labels} labels, its {num_samples} samples"
            f" at {rate} labels per second have {want}; they were made from another corpus or at"
            f" another rate: remove {store.folder} and run hubert label again"
        )


def normalized(audio_S: np.ndarray) -> np.ndarray:
    """The whole utterance with zero mean and unit variance (+ 1e-5, the reference's layer_norm)."""
    mean, variance = audio_S.mean(dtype=np.float64), audio_S.var(dtype=np.float64)
    return ((audio_S - mean) / np.sqrt(variance + 1e-5)).astype(np.float32)


def _crop(
    split: Split, utterance: int, first_frame: int, num_samples: int, normalize: bool
) -> np.ndarray:
    start = first_frame * frames.HOP
    stop = start + num_samples
    if normalize:
        audio_S = normalized(split.audio(utterance))[start:stop]
    else:
        audio_S = split.audio(utterance, start, stop)
    if audio_S.shape != (num_samples,):
        raise ValueError(
            f"utterance {split.ids[utterance]!r}: samples {start} to {stop} gave audio of shape"
            f" {audio_S.shape}, the corpus says it has {split.num_samples[utterance]} samples; the"
            " corpus is damaged: remove its folder and run hubert prepare again"
        )
    return audio_S


class _Epoch(NamedTuple):
    slots: np.ndarray  # the utterance in every slot, an index into those not dropped
    first_frames: np.ndarray  # where the crop in every slot starts
    order: np.ndarray  # of the batches


def _lay_out(num_samples_N: np.ndarray, config: BatchConfig, row_multiple: int) -> rungs.Layout:
    return rungs.lay_out(
        num_samples_N,
        seconds=config.seconds,
        min_seconds=config.min_seconds,
        max_seconds=config.max_seconds,
        num_rungs=config.num_rungs,
        rungs=config.rungs,
        row_multiple=math.lcm(config.row_multiple, row_multiple),
    )


def _batch(layout: rungs.Layout, number: int, slots: np.ndarray, first_frames: np.ndarray) -> Batch:
    rung, first = layout.batch_rungs[number], layout.first_slots[number]
    rows = slice(first, first + layout.rows_R[rung])
    return Batch(
        utterances_B=layout.utterances_N[slots[rows]],
        first_frames_B=first_frames[rows],
        weights_B=np.ones(layout.rows_R[rung], np.float32),
        num_samples=int(layout.rungs_R[rung]),
    )


def _shuffle(layout: rungs.Layout, seed: int, epoch: int) -> _Epoch:
    """One epoch. From Philox' raw bits, which no numpy version changes, and stable sorting."""
    num_utterances, num_batches = len(layout.utterances_N), len(layout.first_slots)
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(
        2 * num_utterances + layout.num_repeats + num_batches
    )
    for_order, for_batches, for_crops = np.split(
        bits, [num_utterances, num_utterances + num_batches]
    )

    shuffled = np.argsort(for_order, kind="stable")
    by_rung = shuffled[np.argsort(-layout.rung_N[shuffled], kind="stable")]
    # Repeats come first from those that are not in the batch that they top up.
    in_last = np.zeros(num_utterances, bool)
    in_last[by_rung[layout.first_slots[-1] :]] = True
    others_first = np.concatenate([shuffled[~in_last[shuffled]], shuffled[in_last[shuffled]]])
    slots = np.concatenate([by_rung, np.resize(others_first, layout.num_repeats)])

    # A draw belongs to the utterance, not to its place; a repeat has a draw of its own.
    draws = np.concatenate([for_crops[by_rung], for_crops[num_utterances:]])
    slot_rungs = np.repeat(layout.batch_rungs, layout.rows_R[layout.batch_rungs])
    room = layout.frames_N[slots] - frames.num_frames(layout.rungs_R)[slot_rungs] + 1
    first_frames = (draws >> np.uint64(32)) * room.astype(np.uint64) >> np.uint64(32)
    order = np.argsort(for_batches, kind="stable")
    return _Epoch(slots, first_frames.astype(np.int64), order)
