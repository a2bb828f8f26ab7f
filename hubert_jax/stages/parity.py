# SPDX-License-Identifier: Apache-2.0
"""hubert parity: how far our numbers are from those of transformers, torchaudio and fairseq.

    hubert parity [--size=tiny|base|large] [--out=parity.json]

Random weights and audio go through a peer and through ours, in float32; a peer that is not
installed is represented by what it once computed at the least size ("stored"). A part alone, from
the peer's own input, agrees within 1e-5, everything behind one another within 1e-4: of the value,
or of the largest value where that is above 1. Exit code 1 where something does not.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence

from etils import epath

from hubert_jax import logs
from hubert_jax.data import cards
from hubert_jax.parity import compare, record, signals
from hubert_jax.parity.compare import Row

PEERS = ("transformers", "torchaudio", "fairseq")
KINDS = ("base", "large")
HEADER = ("quantity", "peer", "model", "difference", "relative", "tolerance", "note")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hubert parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--size", choices=("tiny", *KINDS), default="tiny", help="of the models")
    parser.add_argument("--out", type=epath.Path, metavar="FILE", help="the table as JSON")
    args = parser.parse_args(argv)
    rows = list(tiny_rows() if args.size == "tiny" else full_size_rows(args.size))
    print(logs.table([HEADER, *map(_cells, rows)]))
    if args.out:
        write(rows, args.out, size=args.size)
    outside = [row for row in rows if not row.is_within]
    if outside:
        logs.info(f"{len(outside)} of {len(rows)} rows are outside their tolerance: {outside[0]}")
        sys.exit(1)


def tiny_rows() -> Iterator[Row]:
    """Everything, at a size of 3 layers and width 32."""
    installed = installed_peers()
    for peer in PEERS:
        for kind in KINDS:
            logs.info(f"{peer}, {kind}")
            if peer in installed:
                theirs = live().make_record(peer, kind, live().SIZES["tiny"])
            else:
                theirs = record.load(signals.GOLDENS / f"{peer}_{kind}.npz")
                theirs = theirs._replace(version=f"{theirs.version}, stored")
            yield from compare.compare(theirs)
    is_live = "torchaudio" in installed
    yield from signals.mfcc_rows(live().kaldi_mfcc39 if is_live else None)
    for num_frames in signals.NUM_FRAMES:
        yield from signals.mask_rows(num_frames)


def full_size_rows(kind: str) -> Iterator[Row]:
    """The published size of base or large, against the peers that are installed."""
    installed = installed_peers()
    if not installed:
        raise ValueError(f"--size={kind} needs a peer: pip install torch transformers")
    for peer in installed:
        logs.info(f"{peer}, {kind} at its full size")
        yield from compare.compare(live().make_record(peer, kind, live().SIZES[kind]))


def installed_peers() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    return [peer for peer in PEERS if live().is_installed(peer)]


def live():
    """The peers, which need torch."""
    from hubert_jax.parity import peers

    return peers


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (f"{row.difference:.1e}", f"{row.relative:.1e}")
    tolerance = f"{row.tolerance:.1e}" + ("" if row.is_within else " EXCEEDED")
    return (row.quantity, row.peer, row.model, *numbers, tolerance, row.note)


def write(rows: Sequence[Row], path: epath.Path, *, size: str) -> None:
    contents = {
        "size": size,
        "versions": cards.versions(),
        "rows": [row._asdict() | {"is_within": row.is_within} for row in rows],
    }
    with cards.whole(path) as unfinished:
        unfinished.write_text(json.dumps(contents, indent=2))
