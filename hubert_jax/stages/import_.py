# SPDX-License-Identifier: Apache-2.0
"""hubert import: what other stacks made in (weights, k-means codebooks, fairseq's labels).

    hubert import [weights] --from=hf|fairseq|torchaudio|safetensors --path=PATH --out=CKPT
    hubert import codebook  --path=km.npy --config=FILE:it2 --workdir=WORK
    hubert import labels    --path=DIR    --config=FILE:it1 --workdir=WORK [--rate=50]

Weights (a folder of transformers, a .pt file of fairseq, a state dict of torchaudio, or what hubert
export weights wrote) become CKPT/0, which every command takes for a checkpoint: features and units
are computed from it, and with --config.train.start_from=CKPT training starts at it.
A codebook (.npy or .npz of centres) becomes WORK/it2/codebook.npz, of the features that the config
names. Labels (DIR/train.tsv, train.km, valid.tsv, valid.km, dict.km.txt) become WORK/it1/labels;
WORK/corpus must be there, and where there is a codebook they are compared with it. Import the
codebook first, if both. `hubert run` goes on from there: what was imported is not made again.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hubert_jax import checkpoints, config_files, encode, extract, locks, logs, weights
from hubert_jax.data import arrays, cards, codebooks, fairseq_files, labels
from hubert_jax.data.corpus import Corpus, Split
from hubert_jax.interchange import formats
from hubert_jax.ops import frames

OPTIONAL = ("test",)  # splits that are not asked for
RATES = (frames.FRAME_RATE, frames.SAMPLE_RATE // frames.MFCC_HOP)
NUM_COMPARED = 8  # utterances of a split, labelled here too where there is a codebook
# Of their labels must be the same: rounding moves a few of a hundred, another codebook nearly all.
MIN_AGREEMENT = 0.5


def main(argv: Sequence[str]) -> None:
    argv = list(argv)
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        argv.insert(0, "weights")
    top = parser()
    if argv[:1] == ["weights"]:
        args = top.parse_args(argv)
        if args.num_heads is not None and args.format in ("hf", "safetensors"):
            top.error(f"--num_heads is said by the files of --from={args.format}: leave it out")
        import_weights(args.path, args.out, format_=args.format, num_heads=args.num_heads)
        return
    overrides, words = config_files.split_overrides(argv)
    args = top.parse_args(words)
    config = config_files.configured(top, args.config, overrides)
    with locks.held(args.workdir, f"hubert import {args.what}"):
        if args.what == "codebook":
            import_codebook(args.path, config, args.workdir)
        else:
            import_labels(args.path, config, args.workdir, rate=args.rate)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hubert import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = top.add_subparsers(dest="what", required=True, metavar="weights|codebook|labels")
    model, codebook, labels_ = (
        kinds.add_parser(kind, allow_abbrev=False) for kind in ("weights", "codebook", "labels")
    )
    model.add_argument(
        "--from", dest="format", choices=formats.NAMES, required=True, help="whose names and layout"
    )
    model.add_argument("--path", type=epath.Path, required=True, help="a file, or its folder")
    model.add_argument("--out", type=epath.Path, required=True, help="a folder of checkpoints")
    model.add_argument(
        "--num_heads",
        type=int,
        help="of attention, where the files do not say (torchaudio, fairseq)",
    )
    for sub, what in ((codebook, ".npy or .npz of centres"), (labels_, "folder of .tsv and .km")):
        sub.add_argument("--path", type=epath.Path, required=True, help=what)
        sub.add_argument(
            "--config", metavar="FILE[:ITERATION]", required=True, help="and --config.FIELD=VALUE"
        )
        sub.add_argument("--workdir", type=epath.Path, required=True, help="of the project")
    labels_.add_argument(
        "--rate", type=int, choices=RATES, help="labels per second (default: what the config says)"
    )
    return top


# Weights.


def import_weights(
    path: epath.Path, out: epath.Path, *, format_: str, num_heads: int | None
) -> None:
    """OUT/0, a checkpoint of somebody's model, which every stage takes for one of ours.

    Raises ValueError where the files are not a model that we know, or OUT holds another one.
    """
    model = formats.read(path, format_=format_, num_heads=num_heads)
    imported, facts = {"format": format_, "weights": weights.digest(model.arrays)}, model.facts()
    made_from = {"imported": imported, "model": facts["model"], "head": facts["head"]}
    if cards.is_made(out / "card.json", made_from, option="--out"):
        card = cards.read(out / "card.json")
        cards.require(out / "card.json", card, option="--out", **facts)
        logs.info(f"{out}: imported before")
        return
    card = cards.new("checkpoint", made_from=made_from, **facts)
    checkpoints.write_weights(out, model, card)
    cards.write(out / "card.json", card)
    logs.info(f"{out}: {formats.summary(model)}")


# Codebooks.


def import_codebook(path: epath.Path, config: ConfigDict, workdir: epath.Path) -> None:
    """WORK/<iteration>/codebook.npz of somebody's centres, and its card.

    Raises ValueError where they do not fit the config, or there is another codebook.
    """
    source = _source(config, workdir)
    centers_CD = fairseq_files.read_centers(path)
    num_codes, width = centers_CD.shape
    if width != source.width:
        raise ValueError(
            f"{path}: {num_codes} centres of width {width}, but the features of {config.iteration}"
            f" are {source.width} wide; are they rows, and is features.kind={config.features.kind}"
            " what they were made from?"
        )
    _check_num_codes(num_codes, config, path)
    made_from = {"imported": cards.digest(path), "source": source.facts}
    codebook = workdir / config.iteration / "codebook.npz"
    if cards.is_made(codebook.with_suffix(".json"), made_from):
        logs.info(f"{codebook}: imported before")
        return
    codebooks.write(
        codebook, centers_CD, made_from=made_from, source=source.facts, rate=source.rate, arrays={}
    )
    logs.info(f"{codebook}: {num_codes} centres of width {width}")


def _source(config: ConfigDict, workdir: epath.Path) -> extract.Source:
    settings = extract.FeaturesConfig(**config.features)
    return extract.load_source(settings, workdir, extract.local_mesh())


def _check_num_codes(num_codes: int, config: ConfigDict, path: epath.Path) -> None:
    if num_codes != config.kmeans.num_codes:
        raise ValueError(
            f"{path}: {num_codes} codes, kmeans.num_codes of {config.iteration} is"
            f" {config.kmeans.num_codes}; write {num_codes} into the config file, or give"
            f" --config.kmeans.num_codes={num_codes} here and to every later command"
        )
    codebooks.check_num_codes(num_codes)


# Labels.


def import_labels(
    path: epath.Path, config: ConfigDict, workdir: epath.Path, *, rate: int | None
) -> None:
    """WORK/<iteration>/labels/<split> of the .tsv and .km files in a folder.

    Raises ValueError unless every utterance of the corpus has the right number of labels, and,
    where the iteration has a codebook, they are of it.
    """
    corpus = Corpus(workdir / "corpus")
    found = {name: find(path, name) for name in corpus.splits}
    manifests = {name: manifest for name, manifest in found.items() if manifest is not None}
    rate = rate or {"mfcc": RATES[1], "layer": RATES[0]}[config.features.kind]
    num_codes = config.kmeans.num_codes
    if (path / fairseq_files.DICTIONARY).exists():
        num_codes = fairseq_files.read_dictionary(path / fairseq_files.DICTIONARY)
    _check_num_codes(num_codes, config, path)

    codebook, comparison = workdir / config.iteration / "codebook.npz", None
    if codebook.exists():
        cards.require(codebook.with_suffix(".json"), codebooks.read_card(codebook), rate=rate)
        comparison = Comparison(codebook, _source(config, workdir), config)
    codes_of = codebook if codebook.exists() else manifests["train"].with_suffix(".km")
    facts = {
        "corpus": corpus.card["fingerprint"],
        "codebook": cards.digest(codes_of),  # pretrain asks for that of the codebook, if any
        "num_codes": num_codes,
        "rate": rate,
    }
    read = [
        _read_split(manifest, corpus.split(name), facts) for name, manifest in manifests.items()
    ]
    if comparison is not None:
        for part in read:
            comparison.check(part)
    folders = [workdir / config.iteration / "labels" / part.split.name for part in read]
    is_made = [  # all or none: what differs is refused before anything is written
        cards.is_made(folder / "card.json", _made_from(part, facts))
        for part, folder in zip(read, folders, strict=True)
    ]
    for part, folder, is_there in zip(read, folders, is_made, strict=True):
        if is_there:
            logs.info(f"{folder}: imported before")
        else:
            _write_split(part, folder, facts, config.labels.num_shards)
        logs.info(labels.summary(part.split.name, cards.read(folder / "card.json")))


def find(path: epath.Path, name: str) -> epath.Path | None:
    """The manifest of a split; None where a split that may be missing is."""
    candidates = [path / f"{theirs}.tsv" for theirs in fairseq_files.NAMES[name]]
    found = [manifest for manifest in candidates if manifest.exists()]
    wanted = " or ".join(manifest.name for manifest in candidates)
    if len(found) > 1:
        raise ValueError(f"{path}: {wanted}? Both are there: remove the one that is not meant")
    if not found and name not in OPTIONAL:
        raise FileNotFoundError(
            f"{path}: no {wanted}; labels come with the manifest that names their utterances, as"
            " fairseq's train.tsv, train.km, valid.tsv, valid.km"
        )
    if not found:
        logs.info(f"{path}: no {wanted}, so no labels for the split {name!r}")
        return None
    if not found[0].with_suffix(".km").exists():
        raise FileNotFoundError(f"{found[0].with_suffix('.km')}: no labels beside {found[0].name}")
    return found[0]


class Part(NamedTuple):
    """The labels of a split, found and not yet stored."""

    split: Split
    imported: dict[str, str]  # digests, for the card
    lines: fairseq_files.LabelFile
    stretches: list[fairseq_files.Stretch]


def _read_split(manifest: epath.Path, split: Split, facts: cards.Card) -> Part:
    path = manifest.with_suffix(".km")
    imported = {"manifest": cards.digest(manifest), "labels": cards.digest(path)}
    rows = fairseq_files.read_manifest(manifest).rows
    with logs.Progress(f"read {path.name}", path.stat().length / 1e6, "MB") as progress:
        lines = fairseq_files.LabelFile(
            path,
            num_lines=len(rows),
            num_codes=facts["num_codes"],
            report=lambda num_bytes: progress.advance(num_bytes / 1e6),
        )
    stretches = fairseq_files.match(
        split.ids, split.num_samples.tolist(), rows, lines, rate=facts["rate"]
    )
    num_left = len(rows) - len({stretch.line for stretch in stretches})
    if num_left:
        logs.info(f"{path}: {num_left} of {len(rows)} lines are of no utterance of the corpus")
    return Part(split, imported, lines, stretches)


def _made_from(part: Part, facts: cards.Card) -> cards.Card:
    return {"imported": part.imported, "split": part.split.name, **facts}


def _write_split(part: Part, folder: epath.Path, facts: cards.Card, num_shards: int) -> None:
    split, _, lines, stretches = part
    with logs.Progress(f"labels {split.name}", len(stretches), "utterances") as progress:

        def produce(positions: np.ndarray) -> arrays.Rows:
            for position in positions.tolist():
                yield position, lines.read(stretches[position])
                progress.advance(1)

        arrays.write_store(
            folder,
            ids=[stretch.id for stretch in stretches],
            lengths=np.array([stretch.num_labels for stretch in stretches]),
            width=None,
            dtype="int16",
            num_shards=num_shards,
            produce=produce,
            card=cards.new("labels", made_from=_made_from(part, facts), **facts),
            results=functools.partial(
                labels.results,
                split=split,
                hop=frames.SAMPLE_RATE // facts["rate"],
                num_codes=facts["num_codes"],
            ),
        )


class Comparison:
    """Labels some utterances with the codebook of the iteration, to see that labels are of it."""

    def __init__(self, codebook: epath.Path, source: extract.Source, config: ConfigDict):
        self._codebook, self._source = codebook, source
        self._batch_seconds = config.features.batch_seconds
        self._centers_CD = codebooks.read_matching(
            codebook, source=source.facts, width=source.width, num_codes=config.kmeans.num_codes
        )

    def check(self, part: Part) -> None:
        """Raises ValueError where too few labels are the same."""
        split, _, lines, stretches = part
        stretch_of = {stretch.id: stretch for stretch in stretches}
        num_compared = min(NUM_COMPARED, len(split.ids))
        positions = np.linspace(0, len(split.ids) - 1, num_compared).astype(int)
        extractor = extract.Extractor(
            self._source, split.num_samples[positions], batch_seconds=self._batch_seconds,
            mesh=extract.local_mesh(),
        )  # fmt: skip
        num_same = num_frames = 0
        for position, features_TD in extractor.stream(split, positions):
            codes_T = encode.assign(features_TD, self._centers_CD)
            num_same += int((codes_T == lines.read(stretch_of[split.ids[position]])).sum())
            num_frames += len(codes_T)
        if num_same < MIN_AGREEMENT * num_frames:
            raise ValueError(
                f"{lines.path}: {num_same} of {num_frames} labels of {num_compared} utterances are"
                f" what {self._codebook} gives; these labels are of another codebook, or another"
                " layer: import theirs (hubert import codebook), or remove it to use the labels"
                " without one"
            )
        logs.info(f"{lines.path}: {num_same} of {num_frames} labels compared are the codebook's")
