"""Writes directories that appear whole or not at all: beside their place first, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from nvlm_trt.errors import EngineError


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

    Raises EngineError for a place where no folder can be made."""
    # named before `try`, so that `finally` can remove the folder after an interrupt at any time
    staging = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir(mode=0o700)
        except FileNotFoundError as error:  # the parent exists, but its file system makes no folders (/proc)
            raise _cannot_write(target, error) from error
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def tidy_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as an error does, with exit status 143, so that temporary folders are removed.

    For the main thread. A SIGTERM that is ignored or handled already is left as it is."""
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def replace_directory(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`. An older `target` is renamed first, so that a half-written one is never visible."""
    staging.chmod(0o755)
    if not target.exists():
        os.rename(staging, target)
        return
    with temporary_sibling(target) as aside:
        os.rename(target, aside / "previous")
        os.rename(staging, target)
