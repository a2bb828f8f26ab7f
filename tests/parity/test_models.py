# SPDX-License-Identifier: Apache-2.0
"""Our numbers against the peers themselves, on random weights; .ci/run installs them."""

import pytest

from hubert_jax.parity import compare, peers, signals

INSTALLED = [peer for peer in peers.PEERS if peers.is_installed(peer)]


def assert_within(rows: list[compare.Row]) -> None:
    assert not [row for row in rows if not row.is_within]


def test_the_peers_that_ci_installs_are_there():
    assert INSTALLED[:2] == ["transformers", "torchaudio"]


@pytest.mark.parametrize("kind", peers.NORMS)
@pytest.mark.parametrize("peer", INSTALLED)
def test_every_quantity_is_that_of_the_peer(peer, kind):
    assert_within(compare.compare(peers.make_record(peer, kind, peers.SIZES["tiny"])))


@pytest.mark.full_size
@pytest.mark.parametrize("kind", peers.NORMS)
@pytest.mark.parametrize("peer", INSTALLED)
def test_every_quantity_is_that_of_the_peer_at_the_published_size(peer, kind):
    assert_within(compare.compare(peers.make_record(peer, kind, peers.SIZES[kind])))


def test_mfcc_is_that_of_kaldi():
    assert_within(signals.mfcc_rows(peers.kaldi_mfcc39))
