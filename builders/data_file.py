"""Writes the tensors of a graph into one data file, or goes on with a file that an interrupted build has left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from nvlm_trt.builders.file_writes import BackgroundSync, write_at
from nvlm_trt.builders.graphs.streamed import StreamedTensor
from nvlm_trt.builders.unfinished_build import UnfinishedBuild

# ONNX Runtime maps the tensors that it does not repack. Those of more than a megabyte begin at a page.
_PAGE = 4096
_ALIGNED_BYTES = 1 << 20

Report = Callable[[int], None]  # gets the bytes of the file that are written


class DataFile:
    """A file that holds tensors one after the other. `offsets`: the first byte of each."""

    def __init__(self, path: Path, tensors: Sequence[ir.TensorProtocol]) -> None:
        self.path = path
        self._tensors = tensors
        self.offsets: list[int] = []
        self.nbytes = 0
        for tensor in tensors:
            if tensor.nbytes > _ALIGNED_BYTES:
                self.nbytes = -(-self.nbytes // _PAGE) * _PAGE
            self.offsets.append(self.nbytes)
            self.nbytes += tensor.nbytes

    def write(self, report: Report, unfinished: UnfinishedBuild | None = None) -> None:
        """Write all tensors. With `unfinished`, go on from where that build has reached, and tell it where it is safe.

        Raises OSError, and the errors of reading a tensor."""
        done, first = self._reached(unfinished)
        with contextlib.ExitStack() as stack:
            descriptor = stack.enter_context(self._opened(keep=(done, first) != (0, 0)))
            sync: BackgroundSync | None = None
            if unfinished is not None:

                def tell(position: str) -> None:
                    unfinished.note(self.path, position)

                sync = stack.enter_context(BackgroundSync(descriptor, tell))
            written = 0
            for number, (tensor, offset) in enumerate(zip(self._tensors, self.offsets, strict=True)):
                if not isinstance(tensor, StreamedTensor):  # small, and not always of the checkpoint alone
                    write_at(descriptor, tensor.tobytes(), offset)
                elif number >= done:
                    for rows in tensor.write(descriptor, offset, first if number == done else 0):
                        end = offset + tensor.nbytes * rows // tensor.rows
                        if sync is not None:
                            sync.reached(f"{number} {rows}", end - written)
                        report(written := end)
                report(written := offset + tensor.nbytes)
            if sync is not None:
                sync.finish(f"{len(self._tensors)} 0")

    def _reached(self, unfinished: UnfinishedBuild | None) -> tuple[int, int]:
        """Return how many tensors are whole, and how many rows of the next one are written."""
        position = None if unfinished is None else unfinished.reached(self.path)
        if position is None or self.path.is_symlink() or not self.path.is_file():
            return 0, 0
        if self.path.stat().st_size != self.nbytes:
            return 0, 0
        number, rows = map(int, position.split())
        return number, rows

    @contextlib.contextmanager
    def _opened(self, keep: bool) -> Iterator[int]:
        """Yield a descriptor of the file at its full length. `keep` its data, or make it anew."""
        if not keep:
            self.path.unlink(missing_ok=True)  # a link would lead elsewhere
        descriptor = os.open(self.path, os.O_RDWR | (0 if keep else os.O_CREAT | os.O_EXCL), 0o644)
        try:
            os.ftruncate(descriptor, self.nbytes)
            yield descriptor
        finally:
            os.close(descriptor)
