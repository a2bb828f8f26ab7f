# SPDX-License-Identifier: Apache-2.0
"""The fuzz run in short: every reader, a few dozen inputs. `make fuzz` is the long one."""

import pytest

from tests.fuzz import readers, run

hypothesis = pytest.importorskip("hypothesis")
NUM_INPUTS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz")
    readers.made_folder(made)
    return made


def test_every_reader_reads_or_says_what_is_wrong_with_the_file(folder):
    for target in readers.targets(folder):
        (folder / target.name).write_bytes(target.seeds[0])
        assert readers.attempt(target, folder / target.name), target.name
        _, refused = run.fuzz(target, folder, NUM_INPUTS, seed=0)
        assert refused, f"{target.name}: nothing was refused, so nothing was tried"


def test_an_error_that_does_not_name_the_file_is_a_fault(tmp_path):
    def read(path):
        raise ValueError("something is wrong")

    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    with pytest.raises(readers.Unclear, match="does not name the file"):
        readers.attempt(readers.Target("a.bin", read, (b"x",)), path)
    with pytest.raises(ZeroDivisionError):
        readers.attempt(readers.Target("a.bin", lambda path: 1 / 0, (b"x",)), path)
