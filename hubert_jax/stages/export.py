# SPDX-License-Identifier: Apache-2.0
"""hubert export: numpy features and units of audio, weights, and labels as fairseq has them.

    hubert export features --checkpoint=CKPT --audio=FOLDER --layer=6 --out=DIR
    hubert export units    --checkpoint=CKPT --audio=FOLDER --codebook=FILE --out=DIR
    hubert export weights  --checkpoint=CKPT --format=hf|fairseq|torchaudio|safetensors --out=DIR
    hubert export labels   --labels=WORK/it1/labels --corpus=WORK/corpus --out=DIR
    hubert export codebook --codebook=FILE --out=FILE.npy

Features and units: DIR/<utterance id>.npy (frames, width) or (frames,), DIR/card.json and, for
units, DIR/units.jsonl. Frame t is centred at offset_seconds + t * hop_seconds. Audio of any length
and rate; what cannot be read is listed in DIR/rejected.tsv. Started again, it skips what is there.
Labels: DIR/train.tsv, train.km, valid.tsv, valid.km, dict.km.txt, for the audio files that the
corpus was made from, or those below --audio. A codebook: its centres, (codes, width).
"""

import argparse
import functools
import json
import os
import shlex
from collections.abc import Sequence

from etils import epath

from hubert_jax import checkpoints, frame_files, logs, weights
from hubert_jax.data import arrays, cards, codebooks, fairseq_files, readers
from hubert_jax.data.corpus import Corpus
from hubert_jax.data.utterance import cut_from
from hubert_jax.interchange import formats
from hubert_jax.ops import frames


def main(argv: Sequence[str]) -> None:
    top = parser()
    args = top.parse_args(argv)
    if args.what == "weights":
        if args.suffix and args.format != "torchaudio":
            top.error(f"--suffix is for --format=torchaudio, this is {args.format}: leave it out")
        suffix = args.suffix or formats.SUFFIXES[0]
        export_weights(args.checkpoint, args.out, format_=args.format, suffix=suffix)
    elif args.what == "labels":
        export_labels(args.labels, args.corpus, args.out, audio=args.audio)
    elif args.what == "codebook":
        export_codebook(args.codebook, args.out)
    else:
        frame_files.write(
            frame_files.from_corpus(args.corpus) if args.corpus
            else frame_files.from_audio(args.audio),
            args.checkpoint,
            args.out,
            layer=args.layer,
            codebook=args.codebook if args.what == "units" else None,
            dtype=args.dtype if args.what == "features" else None,
            batch_seconds=args.batch_seconds,
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hubert export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = top.add_subparsers(
        dest="what", required=True, metavar="features|units|weights|labels|codebook"
    )
    for kind in ("features", "units", "weights", "labels", "codebook"):
        sub = kinds.add_parser(kind, allow_abbrev=False)
        add = functools.partial(sub.add_argument, type=epath.Path, required=True)
        if kind in ("features", "units", "weights"):
            add("--checkpoint", metavar="CKPT", help="WORK/it1/checkpoints or one step in it")
        if kind in ("units", "codebook"):
            add("--codebook", metavar="FILE", help="a codebook.npz")
        is_file = kind == "codebook"
        add("--out", metavar="FILE.npy" if is_file else "DIR", help="where it is written")
        if kind in ("features", "units"):
            _add_audio(sub)
        if kind == "features":
            sub.add_argument("--layer", type=int, required=True, help="0: input of the first one")
            sub.add_argument("--dtype", choices=["float32", "float16"], default="float32")
        elif kind == "units":
            sub.add_argument("--layer", type=int, help="as a check: the codebook knows its layer")
        elif kind == "weights":
            sub.add_argument(
                "--format",
                choices=formats.NAMES,
                default="safetensors",
                help="whose names and layout; safetensors: our own names (default)",
            )
            sub.add_argument(
                "--suffix",
                choices=formats.SUFFIXES,
                help=f"of torchaudio's state dict (default {formats.SUFFIXES[0]})",
            )
        elif kind == "labels":
            add("--labels", metavar="WORK/it1/labels", help="what hubert label or import made")
            add("--corpus", metavar="WORK/corpus", help="what hubert prepare made")
            sub.add_argument(
                "--audio", metavar="FOLDER", help="the audio files (default: the corpus' source)"
            )
    return top


def _add_audio(sub: argparse.ArgumentParser) -> None:
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", metavar="FOLDER", help="or KIND:PATH, as in corpus.train")
    source.add_argument("--corpus", metavar="WORK/corpus", help="what hubert prepare made")
    sub.add_argument(
        "--batch_seconds", type=float, default=120.0, help="audio on the devices (default 120)"
    )


# Labels and codebooks, as fairseq has them.


def export_labels(
    folder: epath.Path, corpus_folder: epath.Path, out: epath.Path, *, audio: str | None
) -> None:
    """OUT/{train,valid,test}.tsv and .km of the splits that have labels, OUT/dict.km.txt, card.

    Raises ValueError where an utterance is no file that fairseq could read.
    """
    corpus = Corpus(corpus_folder)
    stores = {
        name: arrays.Store(folder / name)
        for name in corpus.splits
        if (folder / name / "card.json").exists()
    }
    if not stores:
        raise FileNotFoundError(f"{folder}: no labels; WORK/<iteration>/labels has some")
    first = next(iter(stores.values())).card
    made_from = {"corpus": corpus.card["fingerprint"], "codebook": first["codebook"], "labels": {}}
    manifests = {}
    for name, store in stores.items():
        store.check()
        cards.require(
            store.folder / "card.json", store.card,
            kind="labels", corpus=corpus.card["fingerprint"],
            codebook=first["codebook"], num_codes=first["num_codes"],
        )  # fmt: skip
        manifests[name] = _manifest(store, corpus, name, audio or _source_of(corpus, name))
        made_from["labels"][name] = {"shards": store.card["shards"], "root": manifests[name].root}
    fields = {name: first[name] for name in ("num_codes", "rate")}
    card = cards.new("fairseq labels", made_from=made_from, **fields)
    paths = {name: out / f"{fairseq_files.NAMES[name][0]}.km" for name in stores}
    files = [path.with_suffix(end).name for path in paths.values() for end in (".tsv", ".km")]
    if not _begin(out, card, [fairseq_files.DICTIONARY, *files]):
        return
    for name, store in stores.items():
        path = paths[name]
        fairseq_files.write_manifest(path.with_suffix(".tsv"), manifests[name])
        fairseq_files.write_labels(path, (store[id_] for id_ in store.ids))
        logs.info(f"{path}: {store.num_rows} labels of {len(store)} utterances")
    fairseq_files.write_dictionary(out / fairseq_files.DICTIONARY, first["num_codes"])
    for rate, count in corpus.card["files_by_sample_rate"].items():
        if int(rate) != frames.SAMPLE_RATE:
            logs.info(
                f"{count} files are at {rate} Hz; fairseq wants them at 16000 Hz: convert them"
            )
    cards.write(out / "card.json", card | {"is_finished": True})


def _source_of(corpus: Corpus, name: str) -> str:
    """Where the audio of a split came from, as the config said."""
    sources = corpus.card["made_from"]["corpus"]
    return sources[name] or sources["train"]


def _manifest(store: arrays.Store, corpus: Corpus, name: str, audio: str) -> fairseq_files.Manifest:
    """The files of the utterances, in the order of their labels."""
    root, paths = _files(audio, name)
    split = corpus.split(name)
    num_samples = dict(zip(split.ids, split.num_samples.tolist(), strict=True))
    missing = [id_ for id_ in store.ids if id_ not in paths]
    if missing:
        reason = "give the folder that the ids begin in: --audio=FOLDER"
        if cut_from(missing[0]) in paths:
            reason = (
                "it is a piece of a long recording, and fairseq's labels are of whole files:"
                " prepare the corpus with a larger corpus.max_seconds"
            )
        raise ValueError(
            f"{name}: {len(missing)} of {len(store)} utterances are no files below {root},"
            f" {missing[0]!r} for one; {reason}"
        )
    rows = [fairseq_files.Row(paths[id_], num_samples[id_]) for id_ in store.ids]
    return fairseq_files.Manifest(root, rows)


def _files(audio: str, name: str) -> tuple[str, dict[str, str]]:
    """The folder that ids begin in, and below it the path of the file of each id."""
    try:
        sources = readers.parse(audio)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}; say where with --audio=FOLDER") from error
    if len(sources) != 1 or sources[0].is_archive or sources[0].kind == "synth":
        raise ValueError(
            f"{name}: its audio is {audio!r}, but fairseq reads files below one folder; unpack"
            " them, and give the folder that the ids begin in: --audio=FOLDER"
        )
    (source,) = sources
    root = os.path.abspath(source.path)
    if source.kind == "tsv":
        root = fairseq_files.read_manifest(source.path).root
    items = readers.listing(source, speaker_pattern="").items
    return root, {item.id: os.path.relpath(item.path, root) for item in items}


def export_codebook(codebook: epath.Path, out: epath.Path) -> None:
    """FILE.npy: the centres, float32 (codes, width)."""
    if out.suffix != ".npy":
        raise ValueError(f"--out={out}: centres are written as .npy; give FILE.npy")
    card = codebooks.read_card(codebook)
    fairseq_files.write_centers(out, codebooks.read_centers(codebook))
    logs.info(
        f"{out}: {card['num_codes']} centres of width {card['width']}. What fairseq's k-means"
        f" scripts open:\n  {_joblib_command(out)}"
    )


def _joblib_command(path: epath.Path) -> str:
    """Turns centres into an object that has them as cluster_centers_, all that fairseq asks for."""
    program = (
        "import joblib, numpy, types\njoblib.dump(types.SimpleNamespace(cluster_centers_="
        f"numpy.load({json.dumps(os.fspath(path))})),"
        f" {json.dumps(os.fspath(path.with_suffix('.bin')))})"
    )
    return f"python -c {shlex.quote(program)}"


# Weights.


def export_weights(checkpoint: epath.Path, out: epath.Path, *, format_: str, suffix: str) -> None:
    """DIR with the model's files in a format, and a card."""
    model, card = checkpoints.load_weights(checkpoint)
    made_from = {"weights": weights.digest(model.arrays), "format": format_}
    if format_ == "torchaudio":
        made_from["suffix"] = suffix
    card = cards.new("weights", made_from=made_from, step=card["step"], **model.facts())
    if not _begin(out, card, formats.FILES[format_]):
        return
    try:
        formats.write(model, out, format_=format_, suffix=suffix)
    except (ValueError, ImportError):  # what a format cannot hold leaves no mark
        (out / "card.json").unlink()
        raise
    cards.write(out / "card.json", card | {"is_finished": True})
    logs.info(f"{out}: {formats.summary(model)}")


def _begin(out: epath.Path, card: cards.Card, patterns: Sequence[str]) -> bool:
    """Whether there is something to write into OUT, which is marked as unfinished from here on.

    Raises ValueError where OUT holds an export of something else, or somebody's files.
    """
    path = out / "card.json"
    if cards.is_made(path, card["made_from"], option="--out"):
        made = cards.read(path)
        facts = {name: x for name, x in card.items() if name not in ("versions", "step")}
        cards.require(path, made, option="--out", **facts)
        is_finished = made.get("is_finished", True)
        if is_finished:
            logs.info(f"{out}: done before")
        return not is_finished
    found = sorted(path for pattern in patterns for path in out.glob(pattern))
    if found:
        raise ValueError(
            f"{found[0]} is there already, and no card.json that says what made it: choose another"
            " --out, or remove it"
        )
    cards.write(path, card | {"is_finished": False})
    return True
