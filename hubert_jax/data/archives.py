# SPDX-License-Identifier: Apache-2.0
"""Tar archives read in one pass, never unpacked: a .tar.gz cannot be read in any other order."""

import gzip
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator

SUFFIXES = (".tar.gz", ".tgz", ".tar")


def members(
    path: str, wanted: Callable[[str], bool], report: Callable[[float], None] = lambda _: None
) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of the files in an archive that are `wanted`.

    Links and devices are left out. `report` is told the bytes read of the archive. Raises
    ValueError where a name leads out of the archive, and where the archive is not whole.
    """
    with open(path, "rb") as compressed:
        is_gzip = compressed.read(2) == b"\x1f\x8b"
        compressed.seek(0)
        reported = 0
        # Not tarfile's own decompression: that takes a file which ends early for a whole one.
        stream = gzip.GzipFile(fileobj=compressed) if is_gzip else compressed
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if posixpath.isabs(member.name) or ".." in member.name.split("/"):
                        raise ValueError(
                            f"{path}: member {member.name!r} leads out of the archive; "
                            f"it is damaged or malicious and was not read further"
                        )
                    if member.isfile() and wanted(member.name):
                        file = archive.extractfile(member)
                        assert file is not None
                        yield member.name, file.read()
                    report(compressed.tell() - reported)
                    reported = compressed.tell()
            while stream.read(2**20):  # padding, then the checksum
                pass
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise ValueError(
                f"{path}: broken after {compressed.tell()} of {os.path.getsize(path)} bytes "
                f"({error}); download it again"
            ) from error
