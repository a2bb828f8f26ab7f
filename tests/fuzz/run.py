# SPDX-License-Identifier: Apache-2.0
"""Gives files with anything in them to every reader, by hypothesis, seeded.

    make fuzz                                        # 100,000 inputs
    python -m tests.fuzz.run --num_inputs=1000 --only=a.wav

A reader may refuse, naming the file; a crash, another kind of error, more than SECONDS for one
input or more memory than the limit ends the run with the input, which is kept.
"""

import argparse
import collections
import contextlib
import pathlib
import resource
import signal
import sys
import tempfile
import time
import warnings

import hypothesis
from hypothesis import strategies as st

from tests.fuzz import readers

SECONDS = 20.0  # for one input, by the wall: other work may share the processor
GIGABYTES = 4.0  # of address space beyond what is taken at the start

INTERESTING = st.sampled_from(
    [b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"-1", b"nan",
     b"99999999999999999999", b"\n", b"\t", b'"', b"[" * 100, b"../", b"\x80\x81", b"\x1f\x8b"]
)  # fmt: skip
PLACE = st.floats(0, 1)
CHANGE = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.integers(0, 64)),
    st.tuples(st.just("end"), PLACE, st.just(0)),
    st.tuples(st.just("write"), PLACE, INTERESTING),
    st.tuples(st.just("insert"), PLACE, st.one_of(INTERESTING, st.binary(max_size=16))),
    st.tuples(st.just("repeat"), PLACE, st.integers(1, 64)),
)


def changed(seed: bytes, changes: list) -> bytes:
    """The seed after every change, each at its share of the length."""
    data = bytearray(seed)
    for kind, place, value in changes:
        at = min(int(place * len(data)), max(len(data) - 1, 0))
        if kind == "flip" and data:
            data[at] ^= 1 << value
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "end":
            del data[at:]
        elif kind == "write":
            data[at : at + len(value)] = value
        elif kind == "insert":
            data[at:at] = value
        elif kind == "repeat":
            data[at:at] = data[at : at + value] * 3
    return bytes(data)


def inputs(target: readers.Target):
    seeds = st.sampled_from(target.seeds)
    near = st.builds(changed, seeds, st.lists(CHANGE, min_size=1, max_size=4))
    return st.one_of(near, near, near, st.binary(max_size=200))


@contextlib.contextmanager
def time_limit(seconds: float):
    def late(_number, _frame):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory(gigabytes: float) -> None:
    """An allocation beyond this is a MemoryError and not a machine that swaps."""
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(gigabytes * 1e9), hard))


def fuzz(
    target: readers.Target, folder: pathlib.Path, num_inputs: int, seed: int
) -> tuple[int, int]:
    """(files read, files refused) of a target. Raises what the reader should not have raised."""
    counts: collections.Counter[bool] = collections.Counter()
    path = folder / target.name
    whole = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num_inputs, database=None, deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(inputs(target))
    def one(data: bytes) -> None:
        path.write_bytes(data)
        with warnings.catch_warnings(), time_limit(SECONDS):
            warnings.simplefilter("ignore")
            counts[readers.attempt(target, path)] += 1

    one()
    if whole is None:
        path.unlink()
    else:
        path.write_bytes(whole)
    return counts[True], counts[False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_inputs", type=int, default=100_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one reader, by the name of its file")
    args = parser.parse_args()
    failed = total = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        readers.made_folder(folder)
        chosen = [t for t in readers.targets(folder) if args.only in (None, t.name)]
        for target in chosen:  # once as they are: whatever is loaded late is loaded now
            path = folder / target.name
            path.write_bytes(target.seeds[0])
            assert readers.attempt(target, path), f"{target.name}: its seed is not read"
        limit_memory(GIGABYTES)
        print(f"{'file':<32}{'inputs':>8}{'read':>8}{'refused':>9}{'seconds':>9}", flush=True)
        for target in chosen:
            started = time.monotonic()
            num = -(-args.num_inputs // len(chosen))
            try:
                read, refused = fuzz(target, folder, num, args.seed)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                kept = pathlib.Path(tempfile.gettempdir()) / f"fuzz-{target.name.replace('/', '-')}"
                kept.write_bytes((folder / target.name).read_bytes())
                print(f"{target.name}: {type(error).__name__}: {str(error)[:500]}; input: {kept}")
                sys.excepthook(type(error), error, error.__traceback__)
                continue
            total += read + refused
            seconds = time.monotonic() - started
            print(
                f"{target.name:<32}{read + refused:>8}{read:>8}{refused:>9}{seconds:>9.1f}",
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{total} inputs, {failed} readers failed, peak memory {peak:.2f} GB, seed {args.seed}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
