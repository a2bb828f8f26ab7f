# SPDX-License-Identifier: Apache-2.0
"""Features or units of many recordings as numpy files: what `hubert export` writes.

    OUT/<utterance id>.npy   (frames, width) or (frames,)
    OUT/units.jsonl          of units: id, the units with repeats removed, their durations in frames
    OUT/card.json            hop and offset in seconds, layer, what they were made from
    OUT/rejected.tsv         what could not be read, and why

T frames, D width, C codes, N units
"""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from hubert_jax import checkpoints, encode, extract, logs
from hubert_jax.data import audio, cards, readers
from hubert_jax.data.corpus import Corpus
from hubert_jax.ops import frames, windows


class Work(NamedTuple):
    """The recordings of a folder or corpus."""

    origin: str  # for the card
    ids: list[str]
    seconds: list[float]  # about
    open: Callable[[set[str]], Iterator[encode.Recording]]  # those of some ids, in order


def write(
    work: Work,
    checkpoint: epath.Path,
    out: epath.Path,
    *,
    layer: int | None,
    codebook: epath.Path | None,
    dtype: str | None,
    batch_seconds: float,
) -> None:
    """Writes units where there is a codebook, features in `dtype` where there is none.

    Started again, it skips what is there; what cannot be read is listed in OUT/rejected.tsv.
    """
    paths = output_paths(work.ids, out)
    encoder, card = checkpoints.load_encoder(checkpoint)
    facts = extract.checkpoint_facts(encoder, card)
    mesh = extract.local_mesh()
    if codebook is not None and layer is None:
        layer = encode.layer_of(codebook)
    assert layer is not None  # the parser's doing
    source = extract.layer_source(encoder, facts, layer=layer, mesh=mesh)
    centers_CD = None if codebook is None else encode.read_codebook(codebook, source)
    if codebook is None or centers_CD is None:
        content: cards.Card = {"width": source.width}
    else:
        content = {"num_codes": len(centers_CD), "codebook": cards.digest(codebook)}
        dtype = "int16" if len(centers_CD) <= 2**15 else "int32"
    content |= {"dtype": dtype}
    made_from = {"source": source.facts, "audio": work.origin, **content}
    card = cards.new(
        "features" if codebook is None else "units",
        made_from=made_from,
        mode="exact",  # padding leaves no trace; Encoder.features
        layer=layer,
        hop_seconds=frames.HOP / frames.SAMPLE_RATE,
        offset_seconds=frames.RECEPTIVE_FIELD / 2 / frames.SAMPLE_RATE,
        window_seconds=windows.WINDOW / frames.FRAME_RATE,
        overlap_seconds=windows.OVERLAP / frames.FRAME_RATE,
        **content,
    )
    if not cards.is_made(out / "card.json", made_from, option="--out"):
        cards.write(out / "card.json", card | {"is_finished": False})

    seconds = dict(zip(work.ids, work.seconds, strict=True))
    missing = {id_ for id_, path in paths.items() if not path.exists()}
    done = sum(seconds[id_] for id_ in work.ids if id_ not in missing)
    rejected: dict[str, str] = {}
    wasted: list[float] = []
    parts = encode.stream(
        source,
        work.open(missing),
        ladder=encode.LADDER,
        batch_seconds=batch_seconds,
        max_rows=len(missing) + int(sum(work.seconds) * frames.FRAME_RATE / windows.WINDOW),
        mesh=mesh,
        report_padding=wasted.append,
    )
    title = f"export {card['kind']}"
    with logs.Progress(title, sum(work.seconds), done=done) as progress:
        for id_, parts_of_id in itertools.groupby(parts, key=lambda part: part.id):
            try:
                with cards.whole(paths[id_]) as unfinished:
                    rows = _rows(parts_of_id, centers_CD, progress)
                    write_rows(unfinished, (part.astype(dtype) for part in rows))
            except audio.Rejected as error:
                rejected[id_] = str(error)

    _write_rejected(rejected, len(work.ids), out)
    if codebook is not None:
        write_units({id_: path for id_, path in paths.items() if id_ not in rejected}, out)
    counts = {"num_utterances": len(paths) - len(rejected), "num_rejected": len(rejected)}
    cards.write(out / "card.json", card | counts | {"is_finished": True})
    padding = f"; {100 * wasted[0]:.0f} % of the work was padding" if missing else ""
    logs.info(f"{title}: {counts['num_utterances']} utterances in {out}{padding}")


def _rows(
    parts: Iterable[encode.Part], centers_CD: np.ndarray | None, progress: logs.Progress
) -> Iterator[np.ndarray]:
    for part in parts:
        if part.rejected:
            raise audio.Rejected(part.rejected)
        progress.advance(part.num_samples / frames.SAMPLE_RATE)
        if centers_CD is None:
            yield part.features_TD
        else:
            yield encode.assign(part.features_TD, centers_CD)


def write_rows(path: epath.Path, parts: Iterable[np.ndarray]) -> None:
    """An .npy file of arrays put together along their first axis, written as they come."""
    header, num_rows = None, 0
    with open(path, "wb") as file:
        for rows in parts:
            if rows.dtype.kind == "f" and not np.isfinite(rows).all():
                raise ValueError(
                    f"{path}: values that are not finite in {rows.dtype}; if they are too large for"
                    " float16, give --dtype=float32"
                )
            if header is None:  # numpy leaves room for the number of rows to grow
                header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, header | {"shape": rows.shape})
            num_rows, shape = num_rows + len(rows), (num_rows + len(rows), *rows.shape[1:])
            file.write(np.ascontiguousarray(rows).data)
        assert header is not None
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": shape})


def write_units(paths: dict[str, epath.Path], out: epath.Path) -> None:
    """units.jsonl: a line for each utterance, repeats taken out."""
    with cards.whole(out / "units.jsonl") as unfinished, open(unfinished, "w") as file:
        for id_, path in paths.items():
            units_N, durations_N = run_lengths(np.load(path))
            line = {"id": id_, "units": units_N.tolist(), "durations": durations_N.tolist()}
            file.write(json.dumps(line) + "\n")


def run_lengths(codes_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes without repeats, and how many frames each lasts: np.repeat gives back `codes_T`."""
    starts_N = np.flatnonzero(np.diff(codes_T, prepend=codes_T[:1] - 1))
    return codes_T[starts_N], np.diff(starts_N, append=len(codes_T))


def output_paths(ids: Sequence[str], out: epath.Path) -> dict[str, epath.Path]:
    """OUT/<id>.npy of every id. Raises ValueError for one that leads elsewhere, or comes twice."""
    paths = {}
    for id_ in ids:
        parts = pathlib.PurePosixPath(id_).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(f"utterance id {id_!r} would be written outside {out}; rename it")
        if id_ in paths:
            raise ValueError(
                f"two recordings have the id {id_!r} (the path without its extension): export them"
                " apart, or rename one"
            )
        paths[id_] = out / f"{id_}.npy"
    return paths


def _write_rejected(rejected: dict[str, str], num_utterances: int, out: epath.Path) -> None:
    path = out / "rejected.tsv"
    path.unlink(missing_ok=True)
    if not rejected:
        return
    rows = [audio.rejected_row(id_, why) for id_, why in rejected.items()]
    with cards.whole(path) as unfinished:
        unfinished.write_text("\n".join(rows) + "\n", encoding="utf-8")
    id_, _, why = rows[0].partition("\t")
    message = (
        f"{len(rejected)} of {num_utterances} recordings left out, listed in {path}; the first is"
        f" {id_}: {why}"
    )
    if len(rejected) == num_utterances:
        raise ValueError(message)
    logs.info(message)


# Where recordings come from.


def from_audio(specification: str) -> Work:
    """Every audio file of a folder (or LibriSpeech tree, archive, manifest: data/readers.py)."""
    listings = {
        source: readers.listing(source, speaker_pattern="")
        for source in readers.parse(specification)
        if source.kind != "synth"
    }
    if not listings:
        raise ValueError(f"--audio={specification} names no folder of audio")

    def open_(ids: set[str]) -> Iterator[encode.Recording]:
        for source, listing in listings.items():
            items = [item for item in listing.items if item.id in ids]
            for recording in readers.recordings(source, items):
                blocks = functools.partial(_blocks, recording)
                yield encode.Recording(recording.item.id, blocks)

    return Work(
        ",".join(f"{source.kind}:{os.path.abspath(source.path)}" for source in listings),
        [item.id for listing in listings.values() for item in listing.items],
        [
            item.num_bytes * listing.seconds_per_byte
            for listing in listings.values()
            for item in listing.items
        ],
        open_,
    )


def _blocks(recording: readers.Recording) -> Iterator[np.ndarray]:
    try:
        file = recording.open()
    except OSError as error:
        raise audio.Rejected(f"unreadable: {error.strerror or error}") from error
    with file, audio.open_file(file) as sound:
        yield from audio.blocks(sound)


def from_corpus(folder: epath.PathLike) -> Work:
    """Every utterance of every split of a prepared corpus."""
    corpus = Corpus(folder)
    splits = [corpus.split(name) for name in corpus.splits]

    def open_(ids: set[str]) -> Iterator[encode.Recording]:
        for split in splits:
            for position, id_ in enumerate(split.ids):
                if id_ in ids:
                    blocks = functools.partial(lambda s, p: [s.audio(p)], split, position)
                    yield encode.Recording(id_, blocks)

    return Work(
        corpus.card["fingerprint"],
        [id_ for split in splits for id_ in split.ids],
        (np.concatenate([s.num_samples for s in splits]) / frames.SAMPLE_RATE).tolist(),
        open_,
    )
