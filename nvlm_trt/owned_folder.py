"""Makes folders whose owner is known by a lock, so that those of a process that was killed can be told and removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def make_owned_folder(path: Path) -> int:
    """Make a folder and lock it. Return a descriptor that holds the lock until it is closed or the process ends.

    A process number in the name would not do: containers that share a file system number their processes alike."""
    while True:
        path.mkdir(mode=0o700)
        # another process may remove the folder as abandoned until it is locked
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            # a file system without locks: nobody can take the folder for abandoned there
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def take_folder(path: Path) -> int | None:
    """Make a folder, or take over one that its owner has left, and lock it as `make_owned_folder` does.

    Returns None if its owner runs, or if that cannot be told because the file system has no locks. Raises
    PermissionError for a folder of another user."""
    made = False
    try:
        while True:
            try:
                path.mkdir(mode=0o700)
                made = True
            except FileExistsError:
                made = False
            # its owner may remove it before it is opened, or locked
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    if os.fstat(descriptor).st_uid != os.getuid():
                        raise PermissionError(errno.EACCES, "the folder belongs to another user", str(path))
                    owned = _locked_now(descriptor, otherwise=made)
                    if owned and _is_at(descriptor, path):
                        return descriptor
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
                if not owned:
                    return None
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def abandoned(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the folders of `make_owned_folder` whose owner has ended. Holds each one's lock while the caller removes
    it."""
    for folder in folders:
        with contextlib.suppress(OSError), _opened(folder) as descriptor:
            if os.fstat(descriptor).st_uid != os.getuid():
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the owner runs
            if _is_at(descriptor, folder):  # else it is removed already, and its owner has made another of that name
                yield folder


def _locked_now(descriptor: int, otherwise: bool) -> bool:
    """Lock an open folder unless somebody has. Return whether it is locked, `otherwise` on a file system without
    locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open folder still has this name."""
    return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
