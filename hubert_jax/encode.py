# SPDX-License-Identifier: Apache-2.0
"""An encoder for whoever has audio: waves of any length in, features or units out, all numpy.

    recordings -> windows of at most 30 s (ops/windows.py) -> batches of a few static shapes
               -> layer L -> joined windows -> nearest centres, for units

`Model` is what `hubert_jax.load` gives; `stream` does the same for many recordings, and `hubert
export` writes what comes out of it.

S samples, T frames, D width, C codes
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
import soxr
from etils import epath

from hubert_jax import checkpoints, extract, sharding
from hubert_jax.data import audio, cards, codebooks
from hubert_jax.model import Encoder
from hubert_jax.ops import frames, nearest, windows

# Windows are padded to one of these (1, 3, 8, 16, 30 s), and XLA compiles each length once.
LADDER = np.array([50, 150, 400, 800, windows.WINDOW + 2]) * frames.HOP  # samples
GROUP_BATCHES = 8  # windows of so many batches are sorted by length: less padding, more memory


def load(path: epath.PathLike) -> "Model":
    """The model of a checkpoints folder (its latest step) or of one step's folder."""
    return Model(*checkpoints.load_encoder(path))


class Model:
    """An encoder on the first device.

    >>> model = hubert_jax.load("work/it2/checkpoints")
    >>> features_TD = model.features(wave_S, layer=6)
    >>> codes_T = model.units(wave_S, "work/units/codebook.npz")

    Frame t is centred at 12.5 ms + t * 20 ms. What lasts longer than 30 s is computed in windows
    that overlap by 5 s.
    """

    def __init__(self, encoder: Encoder, card: cards.Card):
        self.config = encoder.config
        self.card = card
        self._mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.local_devices()[:1])
        self._encoder = jax.device_put(encoder.apart(), sharding.replicated(self._mesh))
        self._checkpoint = extract.checkpoint_facts(encoder, card)

    def features(
        self, wave_S: np.ndarray, *, layer: int, sample_rate: int = frames.SAMPLE_RATE
    ) -> np.ndarray:
        """Output of a layer, float32 (T, D); layer 0 is the input of the first one.

        `wave_S` is mono, float in [-1, 1]; other rates than 16 kHz are resampled. Raises ValueError
        for anything else, and below 400 samples (25 ms), which is one frame.
        """
        return self._features(self._source(layer), wave_S, sample_rate)

    def units(
        self,
        wave_S: np.ndarray,
        codebook: np.ndarray | epath.PathLike,
        *,
        layer: int | None = None,
        sample_rate: int = frames.SAMPLE_RATE,
    ) -> np.ndarray:
        """The code of each frame, int32 T. `codebook` is a codebook.npz, whose card knows the
        layer and the checkpoint it was made from, or centres (C, D) of the `layer` given.
        """
        if isinstance(codebook, np.ndarray):
            if layer is None:
                raise ValueError("centres do not say of which layer they are: give layer=...")
            source, centers_CD = self._source(layer), np.asarray(codebook, np.float32)
            if centers_CD.ndim != 2 or centers_CD.shape[1] != source.width:
                raise ValueError(
                    f"centres of shape {centers_CD.shape}; layer {layer} wants (C, {source.width})"
                )
        else:
            source = self._source(layer_of(codebook) if layer is None else layer)
            centers_CD = read_codebook(codebook, source)
        return assign(self._features(source, wave_S, sample_rate), centers_CD)

    def _source(self, layer: int) -> extract.Source:
        return extract.layer_source(self._encoder, self._checkpoint, layer=layer, mesh=self._mesh)

    def _features(self, source: extract.Source, wave_S: np.ndarray, rate: int) -> np.ndarray:
        wave_S = check_wave(wave_S, rate)
        recording = Recording("wave", lambda: [wave_S])
        rung = min(int(np.searchsorted(LADDER, len(wave_S))), len(LADDER) - 1)
        parts = stream(
            source, [recording], ladder=LADDER[[rung]], batch_seconds=0, max_rows=1, mesh=self._mesh
        )
        return np.concatenate([part.features_TD for part in parts])


def check_wave(wave_S: np.ndarray, sample_rate: int) -> np.ndarray:
    """float32 at 16 kHz of somebody's audio. Raises ValueError."""
    wave_S = np.asarray(wave_S)
    if wave_S.ndim != 1 or wave_S.dtype.kind != "f":
        raise ValueError(
            f"audio of shape {wave_S.shape} and type {wave_S.dtype}; give one channel as float in"
            " [-1, 1]: average channels, divide int16 by 32768"
        )
    if sample_rate != frames.SAMPLE_RATE:
        wave_S = soxr.resample(wave_S, sample_rate, frames.SAMPLE_RATE)
    if len(wave_S) < frames.RECEPTIVE_FIELD:
        raise ValueError(too_short(len(wave_S)))
    if not np.isfinite(wave_S).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(wave_S))} samples are not finite")
    return wave_S.astype(np.float32)


def too_short(num_samples: int) -> str:
    return (
        f"too short: {num_samples} samples at 16 kHz, one frame takes {frames.RECEPTIVE_FIELD}"
        " (25 ms); leave it out, or pad it with silence"
    )


# Many recordings.


class Recording(NamedTuple):
    id: str
    blocks: Callable[[], Iterable[np.ndarray]]  # float32 S at 16 kHz; may raise audio.Rejected


class Part(NamedTuple):
    """The next frames of a recording; its parts follow each other."""

    id: str
    features_TD: np.ndarray
    num_samples: int  # of audio that were read for it
    rejected: str  # why the recording cannot be read, instead of its last part


def stream(
    source: extract.Source,
    recordings: Iterable[Recording],
    *,
    ladder: np.ndarray,
    batch_seconds: float,
    max_rows: int,
    mesh: jax.sharding.Mesh,
    report_padding: Callable[[float], object] = lambda share: None,
) -> Iterator[Part]:
    """Features of the recordings, one after the other; a thread reads while the devices work.

    Batches hold up to `batch_seconds` of audio and `max_rows` windows, padded to a length of
    `ladder`; each device has a window at least. `report_padding` is told in the end which share of
    what was computed was padding.
    """
    if source.normalize:  # whole recordings, not windows
        recordings = (r._replace(blocks=functools.partial(_normalized, r)) for r in recordings)
    extractor = extract.Extractor(
        source._replace(normalize=False),
        np.resize(ladder, max_rows),
        batch_seconds=batch_seconds,
        mesh=mesh,
        rungs_R=ladder,
    )
    groups = _groups(_windows(recordings), GROUP_BATCHES * extractor.batch_samples)
    join, samples_joined = windows.Join(), 0
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, groups, None)
        while group := ahead.result():
            ahead = reader.submit(next, groups, None)
            waves = _Waves(group)
            features = dict(extractor.stream(waves, np.flatnonzero(waves.num_samples)))
            for position, (id_, window, rejected) in enumerate(group):
                if window is not None:
                    done_TD = join.add(window, features.pop(position))
                    stop = window.first_frame * frames.HOP + len(window.wave_S)
                    yield Part(id_, done_TD, stop - samples_joined, "")
                    samples_joined = stop
                if rejected:
                    yield Part(id_, np.zeros((0, source.width), np.float32), 0, rejected)
                if window is None or window.is_last:
                    join, samples_joined = windows.Join(), 0
    report_padding(extractor.share_of_padding)


class _Item(NamedTuple):
    id: str
    window: windows.Window | None
    rejected: str


def _windows(recordings: Iterable[Recording]) -> Iterator[_Item]:
    for id_, blocks in recordings:
        num_windows = 0
        try:
            for window in windows.cut(blocks()):
                num_windows += 1
                yield _Item(id_, window, "")
        except audio.Rejected as error:
            yield _Item(id_, None, str(error))
            continue
        if not num_windows:
            yield _Item(id_, None, too_short(sum(map(len, blocks()))))


def _groups(items: Iterator[_Item], num_samples: int) -> Iterator[list[_Item]]:
    """Lists of items that hold at least so many samples, but for the last."""
    group: list[_Item] = []
    held = 0
    for item in items:
        group.append(item)
        held += len(item.window.wave_S) if item.window else 0
        if held >= num_samples:
            yield group
            group, held = [], 0
    if group:
        yield group


class _Waves:
    """Windows in memory, in the form of a corpus' split."""

    def __init__(self, items: list[_Item]):
        self.ids = [item.id for item in items]
        self._waves = [item.window.wave_S if item.window else np.zeros(0) for item in items]
        self.num_samples = np.array([len(wave_S) for wave_S in self._waves])

    def audio(self, position: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._waves[position][start:stop]


def _normalized(recording: Recording) -> Iterator[np.ndarray]:
    """As batches.normalized, in two passes over the blocks."""
    count, total, squares = 0, 0.0, 0.0
    for block_S in recording.blocks():
        block_S = block_S.astype(np.float64)
        count, total = count + len(block_S), total + block_S.sum()
        squares += np.square(block_S).sum()
    mean = total / max(count, 1)
    scale = np.sqrt(squares / max(count, 1) - mean**2 + 1e-5)
    for block_S in recording.blocks():
        yield ((block_S - mean) / scale).astype(np.float32)


# Codebooks.


def layer_of(path: epath.PathLike) -> int:
    """The layer whose features a codebook.npz was made from."""
    facts = codebooks.read_card(path)["source"]
    if facts["kind"] != "layer":
        raise ValueError(
            f"{path}: made from {facts['kind']} features, not from a layer of a model; give the"
            " codebook of an iteration whose features.kind is 'layer'"
        )
    return facts["layer"]


def read_codebook(path: epath.PathLike, source: extract.Source) -> np.ndarray:
    """Centres float32 (C, D). Raises ValueError unless they were made from this very source."""
    layer, facts = layer_of(path), codebooks.read_card(path)["source"]
    if layer != source.facts["layer"]:
        raise ValueError(
            f"{path}: made from layer {layer}, but layer {source.facts['layer']} was asked for;"
            f" give layer {layer} or another codebook"
        )
    if difference := cards.first_difference(facts, cards.normal(source.facts)):
        field, theirs, ours = difference
        raise ValueError(
            f"{path}: made with {field} {theirs!r}, but here it is {ours!r}; give what the codebook"
            " was made from"
        )
    return codebooks.read_centers(path)


def assign(features_TD: np.ndarray, centers_CD: np.ndarray) -> np.ndarray:
    """The nearest centre of each frame, int32 T; computed in blocks of one static shape."""
    codes = [np.zeros(0, np.int32)]
    for start in range(0, len(features_TD), windows.WINDOW):
        block_TD = features_TD[start : start + windows.WINDOW]
        missing = windows.WINDOW - len(block_TD)
        padded_TD = np.pad(block_TD, ((0, missing), (0, 0)))
        codes.append(np.asarray(_assign(padded_TD, centers_CD))[: len(block_TD)])
    return np.concatenate(codes).astype(np.int32)


_assign = jax.jit(nearest.assign)
