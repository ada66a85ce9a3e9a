"""Makes folders whose owner is known by a lock, so that those of a process that was killed can be told and removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def make_owned_folder(path: Path) -> int:
    """Make a folder and lock it. Return a descriptor that holds the lock until it is closed or the process ends.

    A process number in the name would not do: containers that share a file system number their processes alike."""
    while True:
        path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # a file system without locks: nobody can take the folder for abandoned there
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # another process may have removed the folder as abandoned before it was locked
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def abandoned(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the folders of `make_owned_folder` whose owner has ended. Holds each one's lock while the caller removes
    it."""
    for folder in folders:
        with contextlib.suppress(OSError), _opened(folder) as descriptor:
            if os.fstat(descriptor).st_uid != os.getuid():
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the owner runs
            yield folder


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
