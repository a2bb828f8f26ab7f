# SPDX-License-Identifier: Apache-2.0
"""k-means over more frames than memory holds: seeding on a sample, mini-batches, full passes.

    sample        on a part of it, k-means++ and a few Lloyd passes for every restart; the restart
                  with the lowest inertia goes on with swaps there and as many passes over all
    mini-batches  passes over the shards in random order, every centre with its own learning rate,
                  until the smoothed inertia no longer falls
    full passes   Lloyd: every centre becomes the mean of its frames; no centre is left empty

Frames are split over the devices of a mesh; whatever depends on chance is drawn on the host and
seeding runs on one device, so the number of devices changes nothing but the order of float32 sums.
Between two batches a fit is a `State`, from which another process goes on to the same bits.
Sources: Sculley (2010) for mini-batches, scikit-learn's MiniBatchKMeans for when they end.

N rows (frames), D width, C codes, R restarts, S swaps, L candidates
"""

import contextlib
import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hubert_jax.ops import nearest, plus_plus, rows

PASS_CHUNKS = 4  # chunks a device that a full pass reads at a time
SEEDING_ROWS = 16_384  # of the sample, or 32 a code if that is more: for restarts and swaps
FORGETTING = 4  # a pass starts with counts / 4: earlier rows went to centres that have moved since
INERTIA_LAG = 4  # mini-batches between a step and the look at its inertia: no wait for the device
MAX_REFILLS = 5  # full passes beyond those asked for, to fill empty clusters


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
    """How a codebook is fitted.

    num_codes: centres.
    seed_rows: frames in the sample, which is held in memory; at least num_codes.
    num_restarts: seedings of the sample, of which the best one goes on.
    seed_passes: Lloyd passes over the sample before the restarts are compared; the best one gets as
        many again, each after a few swaps.
    batch_rows: frames in a mini-batch, over all devices.
    max_passes: mini-batch passes over the store at most.
    patience: mini-batches without a lower smoothed inertia after which they end.
    lloyd_passes: full passes at most, after the mini-batches.
    lloyd_tolerance: full passes end when the last one lowered the inertia by a smaller share.
    """

    num_codes: int
    seed_rows: int
    num_restarts: int
    seed_passes: int
    batch_rows: int
    max_passes: int
    patience: int
    lloyd_passes: int
    lloyd_tolerance: float

    def __post_init__(self):
        for name in ("num_codes", "num_restarts", "batch_rows", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"kmeans.{name} is {getattr(self, name)}; give at least 1")
        for name in ("seed_passes", "max_passes", "lloyd_passes", "lloyd_tolerance"):
            if getattr(self, name) < 0:
                raise ValueError(f"kmeans.{name} is {getattr(self, name)}; give at least 0")
        if self.seed_rows < self.num_codes:
            raise ValueError(
                f"kmeans.seed_rows is {self.seed_rows}, fewer than num_codes {self.num_codes}; "
                "give some tens of rows per code"
            )


class KMeans(NamedTuple):
    """A codebook; inertia and counts are those of these very centres over all rows."""

    centers_CD: np.ndarray  # float32
    counts_C: np.ndarray  # int64, rows of each code: none is 0
    inertia: float  # mean squared distance of a row to its centre
    num_batches: int  # mini-batches done
    num_lloyd_passes: int


Array = np.ndarray | jax.Array


@dataclasses.dataclass
class State:
    """Where a fit stands between two batches: from here it goes on as if it had never stopped.

    Arrays lie on the host or are the same on all devices.
    """

    centers_CD: Array  # float32
    counts_C: Array  # int32, the rows that mini-batches have counted for each code
    random: str  # the generator's state before the pass under way, as JSON
    num_runs: int = 0  # of neighbouring rows that the pass under way has done
    # Mini-batches:
    num_passes: int = 0  # whole ones
    num_batches: int = 0
    smoothed: float = math.nan
    lowest: float = math.inf  # of the smoothed inertia
    since_lowest: int = 0
    # (inertia, rows) of those that were not looked at yet
    pending: list[tuple[float | jax.Array, int]] = dataclasses.field(default_factory=list)
    # Full passes:
    num_lloyd_passes: int = -1  # whole ones; -1: the mini-batches are not over
    inertia: float = math.inf  # of the last whole one
    sums: nearest.Sums | None = None  # of the one under way

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it on the host, by name: what an .npz can hold. Waits for the devices."""
        sums = {} if self.sums is None else self.sums._asdict()
        values = {
            **{name: value for name, value in vars(self).items() if name != "sums"},
            "pending": np.reshape([(float(x), num_rows) for x, num_rows in self.pending], (-1, 2)),
            **{f"sums_{name}": array for name, array in sums.items()},
        }
        return {name: np.asarray(value) for name, value in values.items()}

    def progress(self) -> list[int]:
        """How far it is; two states of a fit are the same where these are."""
        return [self.num_batches, self.num_lloyd_passes, self.num_passes, self.num_runs]

    KINDS: ClassVar[dict[str, str]] = {
        "centers_CD": "f", "counts_C": "i", "random": "U", "num_runs": "i", "num_passes": "i",
        "num_batches": "i", "smoothed": "f", "lowest": "f", "since_lowest": "i", "pending": "f",
        "num_lloyd_passes": "i", "inertia": "f",
        "sums_features_CD": "f", "sums_counts_C": "i", "sums_inertia": "f",
    }  # fmt: skip
    MAY_LACK: ClassVar = ("sums_features_CD", "sums_counts_C", "sums_inertia")

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """What `arrays` gave. Raises ValueError where they do not belong together."""
        rest: dict[str, Any] = dict(arrays)
        sums = [rest.pop(f"sums_{name}", None) for name in nearest.Sums._fields]
        values = {name: x if x.ndim else x.item() for name, x in rest.items()}
        values["pending"] = [(inertia, int(rows)) for inertia, rows in rest["pending"].tolist()]
        num_codes, width = np.shape(values["centers_CD"])
        given = [x for x in sums if x is not None]
        shapes = [np.shape(x) for x in (values["counts_C"], *given)]
        wanted = [(num_codes,), (num_codes, width), (num_codes,), ()]
        if shapes not in (wanted[:1], wanted):
            raise ValueError(f"{num_codes} centres of {width}, and arrays of {shapes}")
        np.random.default_rng().bit_generator.state = json.loads(values["random"])
        return cls(**values, sums=None if sums[0] is None else nearest.Sums(*sums))


StartBar = Callable[..., contextlib.AbstractContextManager[Any]]
NO_BAR = types.SimpleNamespace(advance=lambda num_rows, note=None: None)


def _no_bar(
    title: str, total: int | None, *, done: int = 0
) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext(NO_BAR)


def _keep_nothing(state: State) -> None:
    pass


def as_json(random: np.random.Generator) -> str:
    return json.dumps(random.bit_generator.state)


def fit(
    shards: Sequence[np.ndarray],
    config: KMeansConfig,
    *,
    seed: int,
    sharding: NamedSharding,
    progress: StartBar = _no_bar,
    state: State | None = None,
    keep: Callable[[State], None] = _keep_nothing,
) -> KMeans:
    """Fits centres to the rows of `shards`: arrays or memory maps (rows, D) of any float type.

    `sharding` splits the rows of a batch over the devices. In a run of several processes each calls
    this with the same arguments, reads its own rows, and gets the same result. Each phase calls
    `progress(title, total rows or None, done=rows)` for a context manager with
    `advance(rows, note=text)`. `keep` is called with the state after the seeding and after every
    batch but the last of each phase; what `State.arrays` gives of it may be kept. A later call with
    such a `state`, which it moves on, and the same other arguments ends with the same result.
    Raises ValueError when there are fewer rows, or fewer distinct rows, than codes.
    """
    reader = rows.Reader(shards, sharding)
    if reader.num_rows < config.num_codes:
        raise ValueError(
            f"{config.num_codes} codes for {reader.num_rows} frames: lower kmeans.num_codes or "
            "store more frames (features.sample_share)"
        )
    random = np.random.default_rng(seed)
    seed_rows = min(config.seed_rows, reader.num_rows)
    with progress("k-means seeding", seed_rows) as bar:
        sample_ND = reader.sample(seed_rows, random)
        if state is None:
            centers_CD, counts_C = best_seeding(sample_ND, config, random)
            state = State(centers_CD, counts_C, as_json(random))
            keep(state)
        bar.advance(seed_rows)
    random.bit_generator.state = json.loads(state.random)
    if state.num_lloyd_passes < 0:
        done = state.num_batches * config.batch_rows
        with progress("k-means mini-batches", None, done=done) as bar:
            _mini_batches(reader, state, config, random, bar=bar, keep=keep)
        state.num_lloyd_passes, state.num_runs, state.random = 0, 0, as_json(random)
    done = min(state.num_runs * rows.RUN_ROWS, reader.num_rows)
    done += state.num_lloyd_passes * reader.num_rows
    total = (config.lloyd_passes + 1) * reader.num_rows
    with progress("k-means full passes", total, done=done) as bar:
        return _full_passes(reader, state, config, random, sample_ND, bar=bar, keep=keep)


# The three phases


def best_seeding(
    sample_ND: np.ndarray, config: KMeansConfig, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Centres and their counts of the best restart on the sample. Runs on one device.

    Restarts are seeded and compared on a part of the sample, evenly spread, and swaps are tried
    there; the other passes of the best one go over all of it.
    """
    uniform_CRL = plus_plus.draws(
        random, num_codes=config.num_codes, num_restarts=config.num_restarts
    )
    num_swaps = 4 + config.num_codes // 16  # attempts before a pass: the more codes, the more miss
    shape_GSL = (config.seed_passes, num_swaps, uniform_CRL.shape[2])
    return jax.device_get(
        _best_seeding(sample_ND, uniform_CRL, random.random(shape_GSL, np.float32))
    )


@jax.jit
def _best_seeding(sample_ND, uniform_CRL, uniform_GSL):
    sample_ND = sample_ND.astype(jnp.float32)
    part_ND = sample_ND[:: max(1, len(sample_ND) // max(SEEDING_ROWS, 32 * len(uniform_CRL)))]

    def lloyd(rows_ND, centers_CD):
        return nearest.means(nearest.code_sums(rows_ND, len(rows_ND), centers_CD), centers_CD)

    def lloyd_on_part(centers_CD, _):
        return lloyd(part_ND, centers_CD), None

    def swap_and_lloyd(centers_CD, uniform_SL):
        return lloyd(sample_ND, plus_plus.swap(part_ND, centers_CD, uniform_SL)), None

    def improve(centers_CD):
        centers_CD, _ = jax.lax.scan(lloyd_on_part, centers_CD, length=len(uniform_GSL))
        return centers_CD, nearest.code_sums(part_ND, len(part_ND), centers_CD).inertia

    centers_RCD, inertia_R = jax.lax.map(improve, plus_plus.seed(part_ND, uniform_CRL))
    best_CD = centers_RCD[jnp.argmin(inertia_R)]
    best_CD, _ = jax.lax.scan(swap_and_lloyd, best_CD, uniform_GSL)
    return best_CD, nearest.code_sums(sample_ND, len(sample_ND), best_CD).counts_C


def refill(sample_ND, centers_CD, kept_C, random: np.random.Generator) -> np.ndarray:
    """The centres with those that are not kept chosen anew among the sample. On one device."""
    uniform_C1L = plus_plus.draws(random, num_codes=len(centers_CD), num_restarts=1)
    return jax.device_get(_refill(sample_ND, centers_CD, kept_C, uniform_C1L))


_refill = jax.jit(plus_plus.refill)


def _mini_batches(
    reader: rows.Reader,
    state: State,
    config: KMeansConfig,
    random: np.random.Generator,
    *,
    bar,
    keep: Callable[[State], None],
) -> None:
    """Moves the state on by mini-batches, until they no longer help."""
    state.centers_CD, state.counts_C = reader.replicate((state.centers_CD, state.counts_C))
    for _ in range(state.num_passes, config.max_passes):
        state.random = as_json(random)
        if state.num_runs == 0:
            state.counts_C = state.counts_C // FORGETTING
        for batch in reader.shuffled(config.batch_rows, random, first_run=state.num_runs):
            (state.centers_CD, state.counts_C), inertia = _mini_batch(
                (state.centers_CD, state.counts_C), batch.features_ND, batch.num_rows,
                sharding=reader.sharding,
            )  # fmt: skip
            state.num_batches += 1
            state.num_runs = batch.next_run
            state.pending.append((inertia, batch.num_rows))
            bar.advance(batch.num_rows)
            if len(state.pending) > INERTIA_LAG:
                _look(state, smoothing=2 * config.batch_rows / (reader.num_rows + 1))
                bar.advance(0, note=f"inertia {state.smoothed:.5g}")
                if state.since_lowest >= config.patience:
                    return
            keep(state)
        state.num_passes, state.num_runs = state.num_passes + 1, 0


def _look(state: State, *, smoothing: float) -> None:
    """Smooths the inertia of the oldest mini-batch that was not looked at; as scikit-learn."""
    inertia, num_rows = state.pending.pop(0)
    now = float(inertia) / num_rows
    step = min(1.0, smoothing) * (now - state.smoothed)
    state.smoothed = now if math.isnan(state.smoothed) else state.smoothed + step
    state.since_lowest = 0 if state.smoothed < state.lowest else state.since_lowest + 1
    state.lowest = min(state.lowest, state.smoothed)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="state")
def _mini_batch(state, features_ND, num_valid, *, sharding: NamedSharding):
    """Every centre becomes the mean of the rows counted for it: its learning rate is 1 / count."""
    centers_CD, counts_C = state
    sums = nearest.sharded_code_sums(features_ND, num_valid, centers_CD, sharding=sharding)
    counts_C = counts_C + sums.counts_C
    step_CD = sums.features_CD - sums.counts_C[:, None] * centers_CD
    centers_CD = centers_CD + step_CD / jnp.maximum(counts_C, 1)[:, None]
    return (centers_CD, counts_C), sums.inertia


def _full_passes(
    reader: rows.Reader,
    state: State,
    config: KMeansConfig,
    random: np.random.Generator,
    sample_ND: np.ndarray,
    *,
    bar,
    keep: Callable[[State], None],
) -> KMeans:
    """Moves the state on by full passes, to the codebook."""
    state.centers_CD = reader.replicate(state.centers_CD)
    for num_lloyd in range(state.num_lloyd_passes, config.lloyd_passes + 1 + MAX_REFILLS):
        sums = full_pass(reader, state, bar=bar, keep=keep)
        before, state.inertia = state.inertia, float(sums.inertia) / reader.num_rows
        counts_C = np.asarray(sums.counts_C)
        settled = state.inertia >= (1 - config.lloyd_tolerance) * before
        bar.advance(0, note=f"inertia {state.inertia:.5g}")
        if counts_C.all() and (settled or num_lloyd >= config.lloyd_passes):
            centers_CD, counts_C = np.asarray(state.centers_CD), counts_C.astype(np.int64)
            return KMeans(centers_CD, counts_C, state.inertia, state.num_batches, num_lloyd)
        state.centers_CD = nearest.means(sums, state.centers_CD)
        if not counts_C.all():
            filled_CD = refill(sample_ND, np.asarray(state.centers_CD), counts_C > 0, random)
            state.centers_CD, state.random = reader.replicate(filled_CD), as_json(random)
        state.num_lloyd_passes, state.num_runs, state.sums = num_lloyd + 1, 0, None
    raise ValueError(
        f"{np.sum(counts_C == 0)} of {config.num_codes} clusters stay empty: too few of the "
        f"{len(sample_ND)} frames in the sample differ; lower kmeans.num_codes or raise"
        " kmeans.seed_rows"
    )


def full_pass(
    reader: rows.Reader, state: State, *, bar=NO_BAR, keep: Callable[[State], None] = _keep_nothing
) -> nearest.Sums:
    """The sums of all rows: of those of the state, and of the rest."""
    state.sums = reader.replicate(state.sums or nearest.no_sums(state.centers_CD))
    batch_rows = PASS_CHUNKS * nearest.CHUNK_ROWS * reader.num_devices
    for batch in reader.in_order(batch_rows, first_run=state.num_runs):
        state.sums = _accumulate(
            state.sums, batch.features_ND, batch.num_rows, state.centers_CD,
            sharding=reader.sharding,
        )  # fmt: skip
        state.num_runs = batch.next_run
        bar.advance(batch.num_rows)
        keep(state)
    return state.sums


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="total")
def _accumulate(total, features_ND, num_valid, centers_CD, *, sharding: NamedSharding):
    sums = nearest.sharded_code_sums(features_ND, num_valid, centers_CD, sharding=sharding)
    return jax.tree.map(jnp.add, total, sums)
