# SPDX-License-Identifier: Apache-2.0
"""Our numbers against those that transformers, torchaudio and fairseq once gave (goldens/make.py).

tests/parity repeats it against the peers themselves, where they are installed.
"""

import functools
import json

import numpy as np
import pytest

from hubert_jax.parity import compare, record, signals
from hubert_jax.stages import parity

STORED = [(peer, kind) for peer in parity.PEERS for kind in parity.KINDS]


@functools.cache
def stored(peer: str, kind: str) -> record.Record:
    return record.load(signals.GOLDENS / f"{peer}_{kind}.npz")


def outside(rows: list[compare.Row]) -> set[str]:
    return {row.quantity for row in rows if not row.is_within}


@pytest.mark.parametrize(("peer", "kind"), STORED)
def test_every_quantity_is_within_its_tolerance(peer, kind):
    rows = compare.compare(stored(peer, kind))
    assert not outside(rows), [row for row in rows if not row.is_within]
    assert len(rows) == 14 and all(row.difference < 1e-4 for row in rows)


@pytest.mark.parametrize(
    ("changed", "noticed"),
    [
        ("plain/convolutions", {"convolutions"}),
        ("plain/projection", {"projection alone"}),
        ("plain/layers", {"each layer alone", "every layer", "position alone"}),
        ("padded/layers", {"every layer, padded batch"}),
        ("logits_NK", {"logits"}),
        ("loss", {"loss"}),
        ("penalty", {"feature penalty"}),
        ("gradients/encoder.layers.1.fc1.weight", {"gradient of every parameter"}),
        ("updated/encoder.layers.1.fc1.weight", {"AdamW step from the peer's gradients"}),
    ],
)
def test_a_difference_of_a_thousandth_is_noticed(changed, noticed):
    theirs = stored("fairseq", "base")
    arrays = {**theirs.arrays, changed: theirs.arrays[changed] * np.float32(1.001)}
    assert outside(compare.compare(theirs._replace(arrays=arrays))) >= noticed


def test_another_rule_for_padding_is_noticed(monkeypatch):
    theirs = stored("fairseq", "large")
    rule = compare.valid_frames
    monkeypatch.setattr(
        compare, "valid_frames", lambda *lengths, padding: rule(*lengths, padding="exact")
    )
    rows = compare.compare(theirs)
    assert outside(rows) == {"every layer, padded batch", "output, padded batch"}


def test_a_small_gradient_is_held_to_its_own_size():
    row = compare.compare(stored("fairseq", "base"))[-2]
    assert row.quantity == "gradient of every parameter"
    assert not row._replace(difference=1e-9, relative=1e-3).is_within


def test_weights_of_another_model_are_refused():
    theirs = stored("torchaudio", "base")
    model = {**theirs.model, "num_layers": 3}
    with pytest.raises(ValueError, match=r"missing: .*layers\.2\.attention\.q_proj\.weight"):
        compare.compare(theirs._replace(model=model))


def test_mfcc_is_kaldis():
    rows = signals.mfcc_rows(None)
    assert len(rows) == 4 and not outside(rows)
    assert outside(signals.mfcc_rows(lambda audio_S: signals._mfcc39(audio_S / 2.0**15) * 1.001))


@pytest.mark.parametrize("num_frames", signals.NUM_FRAMES)
def test_masks_have_the_references_statistics(num_frames):
    assert not outside(signals.mask_rows(num_frames))


def test_another_share_of_masks_is_noticed(monkeypatch):
    ours = signals.masking.span_mask

    def thinner(key, num_rows, num_frames, *, prob, length):
        return ours(key, num_rows, num_frames, prob=0.79, length=length)

    monkeypatch.setattr(signals.masking, "span_mask", thinner)
    assert outside(signals.mask_rows(249)) >= {
        "masked share, mean of 10,000 rows", "masked frames, distribution",
    }  # fmt: skip


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(parity, "installed_peers", list)
    monkeypatch.setattr(parity, "PEERS", ("fairseq",))


def test_the_command_prints_and_writes_the_table(nothing_installed, tmp_path, capsys):
    parity.main([f"--out={tmp_path / 'parity.json'}"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    written = json.loads((tmp_path / "parity.json").read_text())
    assert len(printed) == 2 + len(written["rows"]) == 2 + 2 * 14 + 4 + 6
    assert len({len(line) for line in printed}) == 1  # columns are aligned
    assert written["rows"][0]["peer"] == "fairseq 0.12.2, stored"
    assert written["rows"][0]["is_within"] is True and written["versions"]["jax"]


def test_the_command_fails_where_a_row_is_outside(nothing_installed, monkeypatch, capsys):
    monkeypatch.setattr(compare, "PART", 1e-9)
    with pytest.raises(SystemExit) as stopped:
        parity.main([])
    assert stopped.value.code == 1
    assert "1.0e-09 EXCEEDED" in capsys.readouterr().out


def test_full_size_needs_a_peer(nothing_installed):
    with pytest.raises(ValueError, match="--size=large needs a peer: pip install torch"):
        parity.main(["--size=large"])
