# SPDX-License-Identifier: Apache-2.0
"""Phone and word times are read by scoring alone: training cannot see a label of the corpus."""

import ast
import pathlib

from etils import epath

from hubert_jax.data import corpus
from hubert_jax.stages import prepare
from tests.test_loop import get_config, write_tones

PACKAGE = pathlib.Path(__file__).parents[1] / "hubert_jax"
SCORING = "data/labels.py"


def test_only_scoring_asks_a_split_for_its_phones_or_words():
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if called and node.func.attr in ("phones", "words", "text"):
                readers.add(str(path.relative_to(PACKAGE)))
    assert readers == {SCORING}


def test_a_corpus_without_phone_times_gives_the_same_training_audio(tmp_path):
    opened = []
    for name in ("with", "without"):
        write_tones(tmp_path / name)
        if name == "without":
            for path in (tmp_path / name).rglob("*.phn"):
                path.unlink()
        workdir = epath.Path(tmp_path / f"{name}-work")
        prepare.run(get_config(tmp_path / name)("it1"), workdir)
        opened.append(corpus.Corpus(workdir / "corpus"))
    with_phones, without = opened
    assert with_phones.split("train").phones(0) is not None
    assert without.split("train").phones(0) is None
    assert with_phones.card["fingerprint"] == without.card["fingerprint"]
    assert with_phones.split("train").ids == without.split("train").ids
