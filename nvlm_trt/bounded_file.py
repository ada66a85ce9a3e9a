"""Reads whole files whose size has a bound: never a device, a pipe or a folder, never more bytes than are allowed."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# Most bytes of the files that are read whole. Each is far above what any real file needs.
CONFIG_BYTES = 16 << 20  # config.json and manifest.json
INDEX_BYTES = 256 << 20  # an index of shards
TOKENIZER_BYTES = 256 << 20
GRAPH_BYTES = (2 << 30) - 1  # protobuf reads no more
RESULTS_BYTES = 1 << 30  # answers of an evaluation, points of a benchmark
CALIBRATION_BYTES = 2 << 30  # a number per channel of each linear layer

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# a pipe without a writer would block `open`
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class FileTooLargeError(OSError):
    """A file has more bytes than its reader allows."""


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError, whose strerror says in a few words what is wrong."""
    try:
        _check_regular(os.stat(path))  # before it is opened: opening a device may do something
        descriptor = os.open(path, _FLAGS)
    except ValueError:  # a zero byte in the name
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from None
    try:
        _check_regular(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path | str, most_bytes: int) -> bytes:
    """Returns the content of a regular file. Raises OSError as `open_regular` does, FileTooLargeError for a file of
    more than `most_bytes`, which is not read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise FileTooLargeError(errno.EFBIG, f"{size} bytes, at most {most_bytes} are allowed", str(path))
        data = file.read(size + 1)
        if len(data) > size:  # it grows
            data += file.read(most_bytes + 1 - len(data))
        if len(data) > most_bytes:
            raise FileTooLargeError(errno.EFBIG, f"more than the {most_bytes} bytes allowed", str(path))
        return data


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something special")
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(code, f"{kind}, not a regular file")
