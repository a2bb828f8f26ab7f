# SPDX-License-Identifier: Apache-2.0
"""Files on a disk and files in a bucket (gs://, s3://): for libraries that want a real file.

What is read from a bucket by memory map, by array_record or by numpy is copied to this machine's
temporary folder first, once per process; what is written goes there first and is uploaded whole.
"""

import functools
import hashlib
import os
import shutil
import threading

from etils import epath

from hubert_jax.data import leftovers


def is_local(path: epath.PathLike) -> bool:
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root of its disk; one in a bucket is that already.

    epath would resolve gs://bucket/x to a folder gs: of the current one.
    """
    path = epath.Path(path)
    return path.resolve() if is_local(path) else path


def local(path: epath.PathLike) -> str:
    """The file at `path`, to be read by anything: itself, or its copy where it lies in a bucket.

    A file that has changed since is copied again. Raises FileNotFoundError.
    """
    path = epath.Path(path)
    if is_local(path):
        return os.fspath(path)
    stat = path.stat()
    version = f"{os.fspath(path)} {stat.length} {stat.mtime}"
    copy = os.path.join(_copies(), hashlib.sha256(version.encode()).hexdigest() + path.suffix)
    if not os.path.exists(copy):
        unfinished = f"{copy}.{threading.get_ident()}"
        with path.open("rb") as source, open(unfinished, "wb") as target:
            shutil.copyfileobj(source, target, 2**24)
        os.replace(unfinished, copy)
    return copy


def upload(source: epath.PathLike, path: epath.PathLike) -> None:
    """Copies a local file, or a folder with everything in it, to a bucket."""
    source, path = epath.Path(source), epath.Path(path)
    if source.is_dir():
        for inner in source.iterdir():
            upload(inner, path / inner.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, path.open("wb") as target:
        shutil.copyfileobj(file, target, 2**24)


@functools.cache
def _copies() -> str:
    """The folder of this process' copies; it goes when the process ends."""
    return leftovers.folder()
