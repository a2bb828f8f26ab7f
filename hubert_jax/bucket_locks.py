# SPDX-License-Identifier: Apache-2.0
"""The lock of a work directory in a bucket: an object, written by tensorstore on a condition.

    the owner, and "beat": when it was written last, in seconds since 1970, every HEARTBEAT seconds

A write names the generation that it replaces (none, for a new lock), and the store refuses it where
there is another by now: of two runs that start together one gets the lock. Clocks of two hosts may
differ, so a lock counts as stale only after a look at it for two heartbeats at least.
"""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator

from hubert_jax import logs, owners

TIMEOUT = 15.0  # seconds, for one read or write


class Bucket:
    """The objects under a URL (gs://bucket/folder); errors of the store as OSError, in words."""

    def __init__(self, url: str):
        import tensorstore  # Orbax' own way to the bucket; not needed on a disk

        self.url = url
        with self._explained():
            self._store = tensorstore.KvStore.open(url.rstrip("/") + "/").result(TIMEOUT)

    def read(self) -> tuple[owners.Owner | None, bytes]:
        """(the owner or None where there is no lock, the generation to replace)."""
        with self._explained():
            found = self._store.read(owners.NAME).result(TIMEOUT)
        is_there = found.state == "value"
        return owners.parse(found.value) if is_there else None, found.stamp.generation

    def write(self, owner: owners.Owner, *, replaces: bytes) -> bytes:
        """The new generation; b"" where there is another than `replaces`.

        tensorstore tries again where an answer is lost, and is then refused for its own write.
        """
        text = json.dumps(owner | {"beat": time.time()})
        return self._replace(text, replaces) or self._generation_of(owner)

    def remove(self, owner: owners.Owner, *, replaces: bytes) -> None:
        """Where the lock is not this owner's any more, it stays."""
        if not self._replace(None, replaces) and (own := self._generation_of(owner)):
            self._replace(None, own)

    def _replace(self, text: str | None, replaces: bytes) -> bytes:
        with self._explained():
            done = self._store.write(owners.NAME, text, if_equal=replaces).result(TIMEOUT)
        return done.generation

    def _generation_of(self, owner: owners.Owner) -> bytes:
        found, generation = self.read()
        return generation if found is not None and owner.items() <= found.items() else b""

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise OSError(
                f"{self.url}: the lock of the work directory can't be read or written"
                f" ({' '.join(str(error).split())[:300]}); do bucket and credentials exist, and may"
                " they write? Orbax needs the same for checkpoints"
            ) from error


@contextlib.contextmanager
def held(folder: os.PathLike | str, command: str) -> Iterator[None]:
    """As locks.held; also raises OSError where the bucket can't be reached or written."""
    bucket, mine = Bucket(os.fspath(folder)), owners.this(command)
    generation = _take(bucket, mine)
    ended = threading.Event()

    def beat() -> None:
        nonlocal generation
        while generation and not ended.wait(owners.HEARTBEAT):
            with contextlib.suppress(OSError):  # a lost network ends the run elsewhere
                generation = bucket.write(mine, replaces=generation)
        if not generation:
            logs.info(
                f"{bucket.url}: the lock of this run is another's by now, because its heartbeat was"
                " not seen for long, or somebody removed it. Two runs may be at work: end one"
            )

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if generation:
            with contextlib.suppress(OSError):  # it is stale soon
                bucket.remove(mine, replaces=generation)


def owner_of(folder: os.PathLike | str) -> owners.Owner | None:
    """As locks.owner_of."""
    owner, _ = Bucket(os.fspath(folder)).read()
    return owner if owner and owners.is_alive(owner, age=_age(owner)) else None


def _take(bucket: Bucket, mine: owners.Owner) -> bytes:
    """The generation of the lock, once it is this run's. Raises owners.Held."""
    while True:
        owner, generation = bucket.read()
        if owner is not None:
            alive = owners.is_alive(owner, age=_age(owner))
            if alive if owners.is_here(owner) else _is_heard(bucket, owner):
                lock = f"{bucket.url.rstrip('/')}/{owners.NAME}"
                raise owners.Held(bucket.url, bucket.read()[0] or owner, lock)
            logs.info(f"{bucket.url}: its lock is of {owners.name(owner)}, which is gone")
        taken = bucket.write(mine, replaces=generation)
        if taken:
            return taken


def _is_heard(bucket: Bucket, owner: owners.Owner) -> bool:
    def look() -> bytes | None:
        found, generation = bucket.read()
        return generation if found is not None else None

    left = min(max(2 * owners.HEARTBEAT, owners.STALE - _age(owner)), owners.STALE)
    return owners.is_heard(owner, look, seconds=left)


def _age(owner: owners.Owner) -> float:
    beat = owner.get("beat")
    if isinstance(beat, int | float) and math.isfinite(beat):
        return time.time() - beat
    return owners.STALE
