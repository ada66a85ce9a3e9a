"""Opens the files of all ranks, new or as an interrupted writer left them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from nvlm_trt.builders.journal import Journal
from nvlm_trt.builders.tensorrt_llm.layout import CONFIG_FILE, Layout, rank_file
from nvlm_trt.builders.tensorrt_llm.tensor_file import TensorFile
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.engine import JOURNAL

_SYNC_BYTES = 256 << 20  # written again at most, after an interruption


class RankFiles(ClosedOnExit):
    """Holds the open files of all ranks and the journal of what is finished in them."""

    def __init__(self, directory: Path, layouts: Sequence[Layout], journal: Journal) -> None:
        """Go on if the journal has finished tensors and all files are as it left them; else remove what is there of a
        checkpoint, and create the files. Raises OSError."""
        self._stack = contextlib.ExitStack()
        self._journal = journal
        self._waiting: list[str] = []  # written, but not known to be on disk
        self._unsynced = 0
        self.files: list[TensorFile] = []
        with self._stack:
            if journal.done and self._opened(directory, layouts, keep=True):
                journal.start(anew=False)
            else:
                _remove_checkpoint(directory)
                journal.start(anew=True)
                self._opened(directory, layouts, keep=False)
            self._stack = self._stack.pop_all()

    def finished(self, name: str, nbytes: int) -> None:
        """Note that a tensor was written, `nbytes` in all files. A tensor enters the journal after its data is safe."""
        self._waiting.append(name)
        self._unsynced += nbytes
        if self._unsynced >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Bring all that was written to the disk, and into the journal."""
        for file in self.files:
            file.sync()
        self._journal.add(self._waiting)
        self._waiting, self._unsynced = [], 0

    def close(self) -> None:
        self._stack.close()

    def _opened(self, directory: Path, layouts: Sequence[Layout], keep: bool) -> bool:
        try:
            for rank, layout in enumerate(layouts):
                self.files.append(self._stack.enter_context(TensorFile(directory / rank_file(rank), layout, keep)))
        except FileNotFoundError:
            if not keep:
                raise
            self._stack.pop_all().close()
            self.files.clear()
        return bool(self.files)


def _remove_checkpoint(directory: Path) -> None:
    for path in (directory / CONFIG_FILE, directory / JOURNAL, *directory.glob("rank*.safetensors")):
        path.unlink(missing_ok=True)
