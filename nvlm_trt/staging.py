"""Writes directories that appear whole or not at all: beside their place first, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from nvlm_trt.errors import EngineError
from nvlm_trt.owned_folder import abandoned, make_owned_folder

_PREVIOUS = "previous"  # the folder that a new one replaces, until it is in place


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
            raise _cannot_write(path, error) from error
        raise


def _cannot_write(path: Path, error: OSError) -> EngineError:
    return EngineError(f"cannot write {path} ({error.strerror}); choose another place")


@contextlib.contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, on the same file system. Remove the folder at the end unless it was renamed.

    Removes the folders first that killed processes have left for the same target. Raises EngineError for a place where
    no folder can be made."""
    _remove_leftovers(target)
    # named before `try`, so that `finally` can remove the folder after an interrupt at any time
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    owner = -1
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            owner = make_owned_folder(staging)
        except FileNotFoundError as error:  # the parent exists, but its file system makes no folders (/proc)
            raise _cannot_write(target, error) from error
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if owner >= 0:
            os.close(owner)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary siblings of `target`, and theirs, whose process was killed.

    One that holds the previous `target`, because the kill came between the two renames, gives it back first."""
    name = re.compile(rf"\.+{re.escape(target.name)}(\.tmp-\d+-[0-9a-f]+)+")
    with contextlib.suppress(OSError):  # no such folder yet
        leftovers = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
        for path in abandoned(leftovers):
            if (path / _PREVIOUS).is_dir() and not target.exists():
                os.rename(path / _PREVIOUS, target)
            shutil.rmtree(path, ignore_errors=True)


def replace_directory(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`. An older `target` is renamed first, so that a half-written one is never visible."""
    staging.chmod(0o755)
    if not target.exists():
        os.rename(staging, target)
        return
    with temporary_sibling(target) as aside:
        try:
            os.rename(target, aside / _PREVIOUS)
            os.rename(staging, target)
        except BaseException:  # an interrupt too
            if not target.exists():
                os.rename(aside / _PREVIOUS, target)
            raise
