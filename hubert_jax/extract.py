# SPDX-License-Identifier: Apache-2.0
"""Features of a corpus, streaming off the devices: what `hubert features` and `hubert label` share.

    utterances -> batches of a few padded lengths, decoded by threads while the devices work
               -> MFCC-39, or layer L of a checkpoint -> what the stage makes of them -> host

Every padded length is compiled once; all at once, except on a CPU. Features do not depend on the
batch that an utterance is in.

B batch, S samples, T frames, D width, N utterances of a corpus
"""

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from etils import epath

from hubert_jax import logs, processes, sharding, stopping, weights
from hubert_jax.data import arrays, batches, cards, padding
from hubert_jax.data.corpus import Corpus, Split
from hubert_jax.ops import frames, mfcc

if TYPE_CHECKING:  # the model is not needed for MFCC
    from hubert_jax.model import Encoder

READ_AHEAD = 4  # batches decoded before they are needed, a thread each: 7,000 x real time of FLAC
MIN_SHARD_SECONDS = 600.0  # the last batch of a shard is half empty, so shards hold many batches


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    kind: str  # "mfcc", or "layer" of a checkpoint
    checkpoint: str  # an iteration of this work directory, or a folder of checkpoints
    layer: int  # its output; 0 is the input of the first layer
    sample_share: float  # of the training utterances, stored for k-means
    dtype: str  # of stored features: "float16" or "float32"
    batch_seconds: float  # audio of a batch over all devices, padding included
    num_shards: int  # of stored features, at most
    dump: bool  # store the features of every utterance of every split too

    def __post_init__(self) -> None:
        for name, choices in (("kind", ("mfcc", "layer")), ("dtype", ("float16", "float32"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"features.{name} is {getattr(self, name)!r}; give {' or '.join(choices)}"
                )
        if not 0 < self.sample_share <= 1:
            raise ValueError(
                f"features.sample_share is {self.sample_share}; give a share of the utterances"
                " above 0 and at most 1"
            )
        for name in ("batch_seconds", "num_shards"):
            if getattr(self, name) <= 0:
                raise ValueError(f"features.{name} is {getattr(self, name)}; it must be above 0")
        if self.kind == "layer" and not self.checkpoint:
            raise ValueError(
                "features.kind is 'layer', but features.checkpoint is empty: give an iteration of"
                " this work directory (it1) or a folder of checkpoints"
            )


class Source(NamedTuple):
    """Where features come from."""

    facts: dict[str, Any]  # what determines the features: goes into cards and is compared
    hop: int  # samples from frame to frame
    width: int
    normalize: bool  # whole utterances to zero mean and unit variance first
    compute: functools.partial[jax.Array]  # of a jitted one; (audio_BS, num_samples_B) -> (B, T, D)

    @property
    def rate(self) -> int:
        """Frames per second."""
        return frames.SAMPLE_RATE // self.hop

    def num_frames(self, num_samples_N: np.ndarray) -> np.ndarray:
        return frames.num_frames(num_samples_N, hop=self.hop)


def load_source(config: FeaturesConfig, workdir: epath.Path, mesh: jax.sharding.Mesh) -> Source:
    """The source that a config names; the weights of a checkpoint are copied to every device."""
    if config.kind == "mfcc":
        return Source(
            {"kind": "mfcc"}, frames.MFCC_HOP, mfcc.WIDTH, False, functools.partial(_mfcc)
        )
    from hubert_jax import checkpoints  # orbax: a second that MFCC need not wait for

    path = workdir / config.checkpoint / "checkpoints"
    encoder, card = checkpoints.load_encoder(path if path.exists() else config.checkpoint)
    num_steps = card.get("made_from", {}).get("num_steps", card["step"])
    if path.exists() and card["step"] < num_steps:
        raise ValueError(
            f"{path}: trained for {card['step']} of {num_steps} steps; go on with hubert pretrain,"
            f" or name this step: --config.features.checkpoint={path / str(card['step'])}"
        )
    return layer_source(encoder, checkpoint_facts(encoder, card), layer=config.layer, mesh=mesh)


def layer_source(
    encoder: "Encoder", checkpoint: dict[str, Any], *, layer: int, mesh: jax.sharding.Mesh
) -> Source:
    """A layer of an encoder. `checkpoint` are its `checkpoint_facts`."""
    config = encoder.config
    if not 0 <= layer <= config.num_layers:
        raise ValueError(f"layer {layer} was asked for, the model has 0 to {config.num_layers}")
    facts = {"kind": "layer", "checkpoint": checkpoint, "layer": layer}
    encoder = jax.device_put(encoder.apart(), sharding.replicated(mesh))
    compute = functools.partial(_layer, encoder, layer=layer)
    return Source(facts, frames.HOP, config.width, config.normalize_audio, compute)


def checkpoint_facts(encoder: "Encoder", card: cards.Card) -> dict[str, Any]:
    """What identifies the encoder of a checkpoint, wherever it lies."""
    return {"step": card["step"], "encoder": weights.digest(weights.to_named(encoder))}


# Both live here, not in a stage: compiled for one stage, they are there for the next.
_mfcc = jax.jit(mfcc.mfcc39)


@functools.partial(jax.jit, static_argnames="layer")
def _layer(encoder, audio_BS, num_samples_B, *, layer):
    return encoder.features(audio_BS, layer=layer, num_samples_B=num_samples_B, padding="exact")


class Extractor:
    """Computes features of utterances, in batches of a few static shapes.

    >>> lengths = num_samples(corpus)
    >>> extractor = Extractor(source, lengths, batch_seconds=120.0, mesh=local_mesh())
    >>> for position, features_TD in extractor.stream(corpus.split("train"), np.arange(10)): ...
    """

    def __init__(
        self,
        source: Source,
        num_samples_N: np.ndarray,
        *,
        batch_seconds: float,
        mesh: jax.sharding.Mesh,
        rungs_R: np.ndarray | None = None,
    ):
        """`num_samples_N` are the lengths to come: the padded lengths are fitted to them, unless
        given as `rungs_R`, and there is no use in more rows than N.
        """
        self.source = source
        self.mesh = mesh
        self.samples_read = self.samples_computed = 0
        self.batch_samples = round(batch_seconds * frames.SAMPLE_RATE)
        self._rungs = padding.padded_lengths(num_samples_N) if rungs_R is None else rungs_R
        self._max_rows = len(num_samples_N)
        self._compiled: set[tuple[int, int]] = set()  # rows and samples

    @property
    def share_of_padding(self) -> float:
        """Of what was computed so far: silence at the ends of rows, and rows that fill a batch."""
        return 1 - self.samples_read / max(self.samples_computed, 1)

    def stream(
        self,
        split: batches.Split,
        positions: np.ndarray,
        finish: Callable[[jax.Array], jax.Array] = lambda features_BTD: features_BTD,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (position, finish(features) of it) for each of `positions`, the longest first.

        `finish` runs on the devices on whole batches, (B, T, D) -> (B, T) or (B, T, any), and
        treats frames alone. Utterances without a frame come as arrays of no rows.
        """
        lengths = np.asarray(split.num_samples)[positions]
        planned = padding.plan(lengths, self._rungs, self._rows)
        if stopping.compiles_at_once():
            self._compile(planned)
        computed: tuple[np.ndarray, jax.Array] | None = None
        for utterances, audio_BS, num_samples_B in self._load_ahead(split, positions, planned):
            result = finish(self._compute(audio_BS, num_samples_B))
            result.copy_to_host_async()
            if computed is not None:  # one batch late: the devices are at work on the next one
                yield from self._rows_of(split, *computed)
            computed = utterances, result
        if computed is not None:
            yield from self._rows_of(split, *computed)

    def _load_ahead(
        self, split: batches.Split, positions: np.ndarray, planned: Sequence[padding.Batch]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (positions, audio_BS, num_samples_B) of every batch, decoded by threads."""
        ahead: deque[tuple[np.ndarray, Future]] = deque()
        with ThreadPoolExecutor(READ_AHEAD) as threads:
            try:
                for batch in planned:
                    utterances = positions[batch.members]
                    ahead.append((utterances, threads.submit(self._load, split, utterances, batch)))
                    if len(ahead) > READ_AHEAD:
                        utterances, load = ahead.popleft()
                        yield utterances, *load.result()
                while ahead:
                    utterances, load = ahead.popleft()
                    yield utterances, *load.result()
            finally:
                for _, load in ahead:
                    load.cancel()

    def _compile(self, planned: Sequence[padding.Batch]) -> None:
        """Makes the programs that these batches need, where there are several to make."""
        new = {(batch.num_rows, batch.num_samples) for batch in planned} - self._compiled
        compute, rows = self.source.compute, sharding.batch_sharding(self.mesh)
        jitted: Any = compute.func

        def compile_for(shape: tuple[int, int]) -> None:
            audio_BS = jax.ShapeDtypeStruct(shape, np.float32, sharding=rows)
            num_samples_B = jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=rows)
            jitted.lower(*compute.args, audio_BS, num_samples_B, **compute.keywords).compile()

        if len(new) > 1:
            with jax.set_mesh(self.mesh):
                stopping.at_once([functools.partial(compile_for, shape) for shape in sorted(new)])
        self._compiled |= new

    def _rows(self, rung: int) -> int:
        """Rows of a batch of this length: what fits, equally many for each device."""
        ways = sharding.batch_ways(self.mesh)
        fits = min(self.batch_samples // rung, self._max_rows)
        return max(1, fits // ways) * ways

    def _load(
        self, split: batches.Split, utterances: np.ndarray, batch: padding.Batch
    ) -> tuple[np.ndarray, np.ndarray]:
        audio_BS = np.zeros((batch.num_rows, batch.num_samples), np.float32)
        num_samples_B = np.full(batch.num_rows, batch.num_samples, np.int32)
        for row, utterance in enumerate(utterances.tolist()):
            audio_S = split.audio(utterance)
            if self.source.normalize:
                audio_S = batches.normalized(audio_S)
            if len(audio_S) != split.num_samples[utterance]:
                raise ValueError(
                    f"utterance {split.ids[utterance]!r} has {len(audio_S)} samples, the corpus"
                    f" says {split.num_samples[utterance]}; the corpus is damaged: remove its"
                    " folder and run hubert prepare again"
                )
            audio_BS[row, : len(audio_S)] = audio_S
            num_samples_B[row] = len(audio_S)
        return audio_BS, num_samples_B

    def _compute(self, audio_BS: np.ndarray, num_samples_B: np.ndarray) -> jax.Array:
        self.samples_computed += audio_BS.size
        rows = sharding.batch_sharding(self.mesh)
        with jax.set_mesh(self.mesh):
            return self.source.compute(*jax.device_put((audio_BS, num_samples_B), rows))

    def _rows_of(
        self, split: batches.Split, utterances: np.ndarray, result: jax.Array
    ) -> Iterator[tuple[int, np.ndarray]]:
        host = np.asarray(result)
        num_samples = np.asarray(split.num_samples)[utterances]
        self.samples_read += int(num_samples.sum())
        num_frames = self.source.num_frames(num_samples).tolist()
        for row, utterance in enumerate(utterances.tolist()):
            yield utterance, host[row, : num_frames[row]]


def num_samples(corpus: Corpus) -> np.ndarray:
    """The lengths of all utterances of all splits."""
    return np.concatenate([corpus.split(name).num_samples for name in corpus.splits])


def local_mesh() -> jax.sharding.Mesh:
    """All devices of this process: each process works off its own shards."""
    return sharding.make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.local_devices())


def write_store(
    extractor: Extractor,
    split: Split,
    positions: np.ndarray,
    folder: epath.Path,
    *,
    title: str,
    finish: Callable[[jax.Array], jax.Array],
    width: int | None,
    dtype: str,
    num_shards: int,
    card: cards.Card,
    results: Callable[[arrays.Store], cards.Card] = lambda store: {},
) -> None:
    """Streams `positions` of a split into a store, under a progress bar; goes on where it stopped.

    With several processes each computes its share of the shards on its own devices.
    """
    num_samples = np.asarray(split.num_samples)[positions]
    seconds = np.concatenate([[0.0], np.cumsum(num_samples / frames.SAMPLE_RATE)])
    shards = min(num_shards, max(1, int(seconds[-1] / MIN_SHARD_SECONDS)))
    process = processes.this()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        progress: logs.Progress | None = None

        def produce(places: np.ndarray) -> arrays.Rows:
            nonlocal progress
            if progress is None and len(places):
                bar = logs.Progress(
                    title, seconds[-1] / min(process[1], shards), done=seconds[places[0]]
                )
                progress = stack.enter_context(bar)
            place_of = dict(zip(positions[places].tolist(), places.tolist(), strict=True))
            for position, rows in extractor.stream(split, positions[places], finish):
                place = place_of[position]
                yield place, rows
                assert progress is not None
                progress.advance(seconds[place + 1] - seconds[place])

        arrays.write_store(
            folder,
            ids=[split.ids[position] for position in positions],
            lengths=extractor.source.num_frames(num_samples),
            width=width,
            dtype=dtype,
            num_shards=shards,
            produce=produce,
            card=card,
            results=results,
            process=process,
            barrier=lambda: processes.wait(str(folder)),
        )
    if progress is not None:
        elapsed = time.monotonic() - started
        logs.info(
            f"{title}: {len(positions)} utterances, {seconds[-1]:.0f} s of audio in"
            f" {elapsed:.1f} s; {100 * extractor.share_of_padding:.0f} % of the work was padding"
        )
