"""Keeps what long-running work has finished beside its subject, so that the work goes on where it was killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from nvlm_trt.errors import EngineError
from nvlm_trt.owned_folder import abandoned, take_folder
from nvlm_trt.staging import storage_errors

_KEY_LENGTH = 16


@contextlib.contextmanager
def kept_folder(subject: Path, work: str, key: str) -> Iterator[Path]:
    """Yield the folder `.SUBJECT.WORK-KEY` beside `subject`. Remove the folder at the end, unless an error or a signal
    ends the work: the next work of the same key gets the folder as it was left.

    `key`: a hash of everything that the work depends on. Removes the folders of other keys that nobody works in.
    Raises EngineError if another process does the same work, and for a place where no folder can be made."""
    begin = f".{subject.name[:40]}.{work}-"  # file systems take names of 255 bytes
    folder = subject.parent / f"{begin}{key[:_KEY_LENGTH]}"
    with storage_errors(folder):
        owner = take_folder(folder)
    if owner is None:
        raise EngineError(f"another process does the {work} of {subject} in {folder}; wait until it has ended")
    try:
        _remove_others(folder, begin)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(owner)


def _remove_others(folder: Path, begin: str) -> None:
    name = re.compile(rf"{re.escape(begin)}[0-9a-f]{{{_KEY_LENGTH}}}")
    others = [path for path in folder.parent.iterdir() if name.fullmatch(path.name) and path != folder]
    for path in abandoned(others):
        shutil.rmtree(path, ignore_errors=True)
