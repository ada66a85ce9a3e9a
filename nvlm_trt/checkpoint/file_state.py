"""Tells whole weight files from what a broken download leaves, by their sizes and headers. Reads no tensor."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from safetensors import SafetensorError, safe_open

from nvlm_trt.bounded_file import open_regular

Kind = Literal["whole", "missing", "pointer", "cut off", "damaged"]

_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\n.*?^size (\d+)$", re.DOTALL | re.MULTILINE)
_POINTER_BYTES = 1024  # Git LFS writes shorter ones
_MOST_HEADER_BYTES = 100_000_000  # the safetensors package reads no longer header


@dataclass(frozen=True)
class TensorRecord:
    """Place of a tensor in a file: `begin` is its first byte from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileState:
    """What a weight file is. `records`: the tensors that its header lists, also of a file that is cut off."""

    path: Path
    kind: Kind
    nbytes: int = 0  # on the disk
    whole_nbytes: int | None = None  # of the whole file, as its header or its pointer says; None: unknown
    detail: str = ""
    records: dict[str, TensorRecord] = field(default_factory=dict)

    @property
    def fault(self) -> str | None:
        """One line: what is wrong with the file and what to do. None for a whole file."""
        if self.kind == "whole":
            return None
        if self.kind == "missing":
            return f"{self.path} is missing; download or write the checkpoint again"
        if self.kind == "pointer":
            return (
                f"{self.path} is a Git-LFS pointer to {_size(self.whole_nbytes)}, not the weights; run `git lfs pull` "
                "in its folder"
            )
        if self.kind == "cut off":
            return (
                f"{self.path} is not a whole safetensors file, its download ended early: it has {_size(self.nbytes)} "
                f"of {_size(self.whole_nbytes)}; download it again"
            )
        return f"{self.path} is not a whole safetensors file ({self.detail}); download or write it again"


def file_state(path: Path) -> FileState:
    """Reads the header of a weight file. Raises nothing: a file that cannot be read is `damaged`."""
    try:
        with open_regular(path) as file:
            return _state(path, file)
    except FileNotFoundError:
        return FileState(path, "missing")
    except OSError as error:
        return FileState(path, "damaged", detail=str(error.strerror or error))


def _state(path: Path, file: BinaryIO) -> FileState:
    nbytes = os.fstat(file.fileno()).st_size
    if nbytes <= _POINTER_BYTES and (pointer := _POINTER.match(file.read(_POINTER_BYTES))):
        return FileState(path, "pointer", nbytes, int(pointer[1]))
    file.seek(0)
    header, whole = _read_header(file, nbytes)
    if whole is not None and nbytes < whole:
        return FileState(path, "cut off", nbytes, whole, records=header)
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening checks lengths, offsets, overlaps and dtypes
    except (SafetensorError, OSError) as error:
        return FileState(path, "damaged", nbytes, detail=" ".join(str(error).split()))
    return FileState(path, "whole", nbytes, nbytes, records=header)


def _read_header(file: BinaryIO, nbytes: int) -> tuple[dict[str, TensorRecord], int | None]:
    """Reads a header: its length, 8 bytes, then JSON {name: {dtype, shape, data_offsets from its end}}.

    Returns the tensors and the size of the whole file; no tensors and None for a header that makes no sense, which the
    safetensors package explains."""
    start = file.read(8)
    if len(start) < 8:
        return {}, None
    (length,) = struct.unpack("<Q", start)
    if not 0 < length <= _MOST_HEADER_BYTES:
        return {}, None
    if nbytes < 8 + length:
        return {}, None
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        records = {name: _record(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, None
    return records, max((record.begin + record.nbytes for record in records.values()), default=8 + length)


def _record(entry: dict[str, Any], data: int) -> TensorRecord:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    return TensorRecord(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), data + begin, end - begin)


def _size(nbytes: int | None) -> str:
    return "an unknown size" if nbytes is None else f"{nbytes / 1e9:.3f} GB" if nbytes >= 1e6 else f"{nbytes} bytes"
