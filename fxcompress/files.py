"""Files that are replaced whole: whenever a process dies, the old ones or the new ones are there.

All are written under other names and flushed to the disk before any of them is renamed, so a disk
that is full changes nothing.  Renames come one after the other; readers have to be able to do with
the first few of them, so the file that decides comes first.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fxcompress.errors import SaveError

NEW = ".new"
"""Ends the name of a file that is not whole yet."""


def replace_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files so that each holds, whatever happens, what it did before or all of the new.

    Args:
        directory: that they are in.
        writers: by file name, what writes to a path; files are renamed in this order.

    Raises:
        OSError: they cannot be written; what is left of the new ones is removed.
    """
    new = {name: directory / f"{name}{NEW}" for name in writers}
    try:
        for name, write in writers.items():
            write(new[name])
            with new[name].open("rb+") as file:
                os.fsync(file.fileno())
        for name, path in new.items():
            os.replace(path, directory / name)
            _sync(directory)  # in this order on the disk, too
    except BaseException:
        for path in new.values():
            path.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Make the renames in a directory outlast a power cut, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # directories cannot be opened on Windows
        return
    with suppress(OSError):  # nor flushed on every file system
        os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let no two processes write to a directory at once, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_directory(path: Path) -> None:
    """Find out whether files can be written to a directory, and leave no trace.

    Args:
        path: need not exist.

    Raises:
        SaveError: it cannot be made, or nothing can be written there.
    """
    if path.is_file():
        raise SaveError(f"{path} is a file: give a directory, which is made if it is missing")
    missing = [each for each in (path, *path.absolute().parents) if not os.path.lexists(each)]
    made: list[Path] = []
    try:
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".fxcompress-") as file:
            file.write(b"fxcompress")
            file.flush()
    except OSError as error:
        raise SaveError(f"nothing can be written to {path}: {error}") from error
    finally:
        for each in reversed(made):
            each.rmdir()
