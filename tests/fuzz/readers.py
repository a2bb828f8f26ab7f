# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: every reader of files that others wrote or disks have damaged, with seeds.

A target takes the path of a file with any bytes in it. It may succeed, or say in one of the
errors for people what is wrong with the file; anything else is a fault.
"""

import contextlib
import io
import os
import pathlib
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import soundfile
from etils import epath

from hubert_jax import logs
from hubert_jax.data import (
    alignments,
    archives,
    arrays,
    audio,
    cards,
    codebooks,
    fairseq_files,
    shards,
)
from hubert_jax.data import readers as sources
from hubert_jax.data.corpus import Split
from hubert_jax.ops import kmeans
from hubert_jax.stages import cluster

MADE_FROM = {"kmeans": {"num_codes": 3}}
TAG = b"ID3\x04\0\0\0\0\x00\x40" + bytes(64)  # with nothing in it
SETTINGS = shards.Settings(min_samples=400, max_samples=32_000, synth={})


class Target(NamedTuple):
    """`read(path)` is tried on `seeds` (of the file called `name`), changed, and on plain bytes."""

    name: str
    read: Callable[[pathlib.Path], object]
    seeds: tuple[bytes, ...]


class Unclear(AssertionError):
    """An error that a person could make nothing of."""


def attempt(target: Target, path: pathlib.Path) -> bool:
    """Whether the file was read; raises Unclear, or whatever should not have been raised."""
    try:
        target.read(path)
    except audio.Rejected as reason:  # goes into rejected.tsv beside the id
        if not str(reason).strip():
            raise Unclear(repr(reason)) from reason
        return False
    except (ValueError, FileNotFoundError) as error:
        if path.name not in str(error) and path.parent.name not in str(error):
            raise Unclear(f"does not name the file: {error!r}") from error
        return False
    return True


def read_audio(path: pathlib.Path) -> object:
    item = sources.Item("a", os.fspath(path), path.stat().st_size, "s", "", (), -1)
    outcome = shards.process(sources.Recording(item, None), SETTINGS)
    assert outcome.records or all(reason for _, reason in outcome.rejected)
    for record in outcome.records:
        assert len(audio.decode(record.audio)) == record.num_samples
    if not outcome.records:
        raise audio.Rejected(outcome.rejected[0][1])
    return outcome


def read_alignment(path: pathlib.Path) -> object:
    name, suffix = path.name.split(".", 1)
    return alignments.parse({f".{suffix}": path.read_bytes()}, name=name, sample_rate=16_000)


def read_archive(path: pathlib.Path) -> object:
    return [len(data) for _, data in archives.members(os.fspath(path), lambda name: True)]


def read_labels(path: pathlib.Path) -> object:
    return fairseq_files.LabelFile(path, num_lines=3, num_codes=100).lengths


def read_store(path: pathlib.Path) -> object:
    """A store, one of whose files is the fuzzed one."""
    store = arrays.Store(path.parent)
    return store.check(), [store[id_].sum() for id_ in store.ids]


def read_split(path: pathlib.Path) -> object:
    split = Split(epath.Path(path.parent), path.name.removesuffix(".npz"))
    return split.ids, split.num_samples.sum()


def read_codebook(path: pathlib.Path) -> object:
    codebooks.read_card(path.with_suffix(".npz"))
    return codebooks.read_centers(path.with_suffix(".npz")).sum()


def read_state(path: pathlib.Path) -> object:
    """Where a k-means fit stands; what it cannot go on with it names, and begins anew."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        state = cluster.unfinished(epath.Path(path.parent), MADE_FROM, shape=(3, 4))
    if state is None:
        raise ValueError(said.getvalue())
    return state.arrays()


def read_metrics(path: pathlib.Path) -> object:
    return logs.read_metrics(path)


def sound(form: str, subtype: str, *, rate: int = 16_000, channels: int = 1) -> bytes:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    wave = 0.1 * rng.normal(size=(1_600, channels))
    soundfile.write(file, wave, rate, format=form, subtype=subtype)
    return file.getvalue()


def archive(compression: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w{compression}") as made:
        for name, data in (("LibriSpeech/1-2-3.flac", b"x" * 700), ("LibriSpeech/a.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("LibriSpeech/link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        made.addfile(link)
    return file.getvalue()


def npy(**named: np.ndarray) -> bytes:
    file = io.BytesIO()
    if "alone" in named:
        np.save(file, named["alone"])
    else:
        np.savez_compressed(file, **named)  # type: ignore[arg-type]
    return file.getvalue()


def made_folder(folder: pathlib.Path) -> None:
    """A store and a codebook that are whole, for targets that need the other files too."""
    arrays.write_store(
        folder / "store", ids=["a", "b", "c"], lengths=np.array([2, 0, 3]), width=None,
        dtype="int16", num_shards=2, card=cards.new("labels", made_from={"k": 1}),
        produce=lambda positions: [(p, np.arange([2, 0, 3][p], dtype=np.int16)) for p in positions],
    )  # fmt: skip
    codebooks.write(
        epath.Path(folder / "codebook" / "codebook.npz"), np.ones((3, 4), np.float32),
        made_from={}, source={"kind": "mfcc"}, rate=100, arrays={},
    )  # fmt: skip
    random = kmeans.as_json(np.random.default_rng(0))
    state = kmeans.State(np.ones((3, 4), np.float32), np.ones(3, np.int32), random)
    codebooks.keep_unfinished(epath.Path(folder), state.arrays(), made_from=MADE_FROM)


TEXTGRID = b"""File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.3
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.3
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.1
            text = "a"
        intervals [2]:
            xmin = 0.1
            xmax = 0.3
            text = ""
"""
CARD = b'{"kind": "labels", "made_from": {"corpus": "sha256:0"}, "num_codes": 100, "rate": 50}\n'


def targets(folder: pathlib.Path) -> list[Target]:
    """All of them; `folder` is where the whole store and codebook are, see `made_folder`."""

    def of(name: str) -> bytes:
        return (folder / name).read_bytes()

    store = [p.name for p in sorted((folder / "store").iterdir())]
    index = npy(
        ids=np.array(["a", "b"]), num_samples=np.array([16_000, 400]),
        speakers=np.array(["s", "t"]), shards=np.array([1, 1]), digests=np.array([1, 2], np.uint64),
    )  # fmt: skip
    return [
        Target("a.wav", read_audio, (
            sound("WAV", "PCM_16"), sound("WAV", "FLOAT", rate=44_100, channels=2),
            sound("WAV", "PCM_24"), sound("WAV", "ULAW", rate=8_000))),
        Target("a.flac", read_audio, (
            sound("FLAC", "PCM_16"), sound("FLAC", "PCM_24", channels=2))),
        Target("a.ogg", read_audio, (sound("OGG", "VORBIS"), sound("OGG", "OPUS"))),
        Target("a.mp3", read_audio, (
            sound("MP3", "MPEG_LAYER_III"), TAG + sound("MP3", "MPEG_LAYER_III", rate=44_100))),
        Target("a.sph", read_audio, (sound("NIST", "PCM_16"), sound("NIST", "ULAW"))),
        Target("a.w64", read_audio, (
            sound("W64", "PCM_16"), sound("RF64", "PCM_16"), sound("CAF", "PCM_16"))),
        Target("a.aiff", read_audio, (sound("AIFF", "PCM_16"), sound("AU", "PCM_16"))),
        Target("a.tsv", fairseq_files.read_manifest, (b"/root\na/b.wav\t16000\nc.flac\t400\n",)),
        Target("a.km", read_labels, (b"1 2 3\n\n99 0 7 7\n",)),
        Target("dict.km.txt", fairseq_files.read_dictionary, (b"0 1\n1 1\n2 1\n",)),
        Target("km.npy", fairseq_files.read_centers, (
            npy(alone=np.ones((3, 4), np.float32)), npy(cluster_centers_=np.ones((3, 4))))),
        Target("a.phn", read_alignment, (b"0 1600 h#\n1600 4000 ah\n",)),
        Target("a.ctm", read_alignment, (b";; comment\na 1 0.00 0.10 sil\na 1 0.10 0.2 ah\n",)),
        Target("a.textgrid", read_alignment, (TEXTGRID, TEXTGRID.decode().encode("utf-16"))),
        Target("a.tar", read_archive, (archive(""),)),
        Target("a.tar.gz", read_archive, (archive(":gz"),)),
        Target("a.trans.txt", lambda path: sources._transcripts(path.read_bytes(), path.name), (
            b"1-2-3 WORDS AND WORDS\n1-2-4 MORE\n",)),
        Target("card.json", cards.read, (CARD,)),
        Target("train.npz", read_split, (index,)),
        *(Target(f"store/{name}", read_store, (of(f"store/{name}"),)) for name in store),
        *(Target(f"codebook/{name}", read_codebook, (of(f"codebook/{name}"),))
          for name in ("codebook.npz", "codebook.json")),
        Target(codebooks.UNFINISHED, read_state, (of(codebooks.UNFINISHED),)),
        Target("metrics.jsonl", read_metrics, (
            b'{"step": 99, "train/loss": 4.6}\n{"step": 199, "train/loss": 4.4}\n',)),
    ]  # fmt: skip
