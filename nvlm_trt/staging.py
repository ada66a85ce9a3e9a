"""Writes files and directories that appear whole or not at all: beside their place first, then renamed.

A rename never replaces anything unless `overwrite` is given: of two writers of one name, one fails. With `overwrite`
the new directory and the old one change places in a single step, so that there is a whole one at any moment. On file
systems that cannot do that, the name is missing between two renames.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nvlm_trt.errors import EngineError
from nvlm_trt.owned_folder import abandoned, make_owned_folder

_PREVIOUS = "previous"  # the folder that a new one replaces, until it is in place

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)

Refuse = Callable[[], None]  # raises if what has the target's name now may not be replaced


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into a one-line EngineError that names the place."""
    try:
        yield
    except OSError as error:
        # on a full disk, NumPy raises an error without errno after a short write
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None):
            raise EngineError(f"disk full while writing {path}; free space there or choose another place") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise cannot_write(path, error) from error
        raise


def cannot_write(path: Path, error: OSError) -> EngineError:
    return EngineError(f"cannot write {path} ({error.strerror}); choose another place")


@contextlib.contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, on the same file system. Remove the folder at the end unless it was renamed.

    Removes the folders first that killed processes have left for the same target. Raises EngineError for a place where
    no folder can be made."""
    remove_leftovers(target)
    # named before `try`, so that `finally` can remove the folder after an interrupt at any time
    staging = target.parent / f".{_shortened(target)}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    owner = -1
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            owner = make_owned_folder(staging)
        except (FileNotFoundError, FileExistsError) as error:  # the parent makes no folders (/proc), or is a file
            raise cannot_write(target, error) from error
        yield staging
    finally:
        remove(staging)
        if owner >= 0:
            os.close(owner)


def _shortened(target: Path) -> str:
    """Return the part of a name that leaves room for more: file systems take names of 255 bytes."""
    return target.name[:40]


def remove_leftovers(target: Path) -> None:
    """Remove the temporary siblings of `target`, and theirs, whose process was killed.

    One that holds the previous `target`, because the kill came between the two renames, gives it back first."""
    name = re.compile(rf"\.+{re.escape(_shortened(target))}(\.tmp-\d+-[0-9a-f]+)+")
    with contextlib.suppress(OSError):  # no such folder yet
        leftovers = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
        for path in abandoned(leftovers):
            if (path / _PREVIOUS).is_dir() and not target.exists():
                os.rename(path / _PREVIOUS, target)
            shutil.rmtree(path, ignore_errors=True)


def is_replaceable(target: Path, mark: str) -> bool:
    """Whether --overwrite may remove `target`: a folder that holds a file named `mark`, or an empty folder."""
    try:
        names = os.listdir(target)
    except FileNotFoundError:
        return not target.is_symlink()  # another process has removed it meanwhile
    except NotADirectoryError:
        return False
    return mark in names or not names


@contextlib.contextmanager
def published_directory(target: Path, refuse: Refuse, overwrite: bool) -> Iterator[Path]:
    """Yield an empty temporary sibling of `target`; rename it to `target` on success, remove it on any failure.

    Calls `refuse` first, and again before the rename: another process may have written `target` meanwhile."""
    with storage_errors(target):
        refuse()
        with temporary_sibling(target) as staging:
            yield staging
            replace_directory(staging, target, refuse, overwrite)


def replace_directory(staging: Path, target: Path, refuse: Refuse, overwrite: bool) -> None:
    """Rename `staging` to `target`, unless `refuse` raises. An older `target` is removed by the caller's
    `temporary_sibling`, whose name it gets; without `overwrite` nothing but an empty folder is replaced, however late
    it appears."""
    staging.chmod(0o755)
    while True:
        refuse()
        if overwrite and os.path.lexists(target):
            if _swap(staging, target):
                return
        else:
            try:
                os.rename(staging, target)
                return
            except OSError as error:
                if error.errno not in _OCCUPIED or not os.path.lexists(target):
                    raise


def publish_file(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give a written file its name. Raises FileExistsError for a name that is taken, unless `overwrite`."""
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: reserve the name
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)
    else:
        os.unlink(temporary)


def _swap(staging: Path, target: Path) -> bool:
    """Put `staging` in the place of `target`, and `target` in the place of `staging`. Return False if there is nothing
    to replace any more, or if another process was faster."""
    try:
        if _exchange(staging, target):
            return True
    except FileNotFoundError:
        return False
    with temporary_sibling(target) as aside:
        previous = aside / _PREVIOUS
        try:
            os.rename(target, previous)
        except FileNotFoundError:
            return False
        try:
            os.rename(staging, target)
        except BaseException as error:
            with contextlib.suppress(OSError):  # fails if another process has written `target`
                os.rename(previous, target)
            if isinstance(error, OSError) and error.errno in _OCCUPIED:
                return False
            raise
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in a single step. Return False where system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
