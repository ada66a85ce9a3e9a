"""Keeps what a build has written until its engine is published, so that the same build goes on after it was stopped.

.NAME.unfinished/   beside the engine NAME; locked by the build that writes it
    engine/         becomes the engine; holds the journal, which says how far each file is safe
    graphs/         the graphs of which plans are built
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nvlm_trt import staging
from nvlm_trt.builders.journal import Journal
from nvlm_trt.engine import JOURNAL, check_output
from nvlm_trt.errors import DeviceMemoryError, EngineError, NvlmError
from nvlm_trt.owned_folder import take_folder
from nvlm_trt.termination import signal_behind

# What is written within seconds is not worth a folder that somebody has to know of.
_WORTH_KEEPING = 1 << 30  # bytes
_NAME_LENGTH = 40  # file systems take names of 255 bytes

Tell = Callable[[str], None]  # shows a line to the user


def tell_nobody(line: str) -> None: ...


class UnfinishedBuild:
    """The folder of a build, until its engine is published."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self.folder = folder
        self.staging = folder / "engine"
        self.graphs = folder / "graphs"
        self.started = False
        self._tell = tell
        self._journal: Journal | None = None

    def open(self, what: dict[str, Any]) -> None:
        """Keep the files that the journal names if they are of the same `what`. Remove all others."""
        self.staging.mkdir(exist_ok=True)
        had_journal = (self.staging / JOURNAL).exists()
        self._journal = Journal(self.staging, what)
        if not self._journal.done:
            if had_journal:
                self._tell(f"{self.folder} has nothing of this build (another checkpoint, options or versions): anew")
            (self.staging / JOURNAL).unlink(missing_ok=True)  # before that of which it tells
        named = {self.folder / name for name in self._positions()}
        for path in (*self.folder.iterdir(), *self.staging.iterdir(), *_entries(self.graphs)):
            if path not in (self.staging, self.graphs, self.staging / JOURNAL) and path not in named:
                staging.remove(path)
        if named:
            self._tell(f"going on with {self.folder}, which has {_size(self.nbytes)} of this build")

    def start(self) -> None:
        """Write the journal: from now on the folder tells what it holds."""
        assert self._journal is not None, "the journal is opened first"
        self._journal.start(anew=not self._journal.done)
        self.started = True

    def reached(self, path: Path) -> str | None:
        """Return how far a file is safe on the disk, in the words of its writer; None: not at all."""
        return self._positions().get(self._name(path))

    def note(self, path: Path, position: str) -> None:
        """Write into the journal that the disk has a file as far as `position`."""
        assert self._journal is not None, "the journal is opened first"
        self._journal.add([f"{self._name(path)} {position}"])

    def note_whole(self, path: Path, what: str = "whole") -> None:
        """Bring a file to the disk, and write into the journal that it is whole. `what`: words to remember with it."""
        _sync(path)
        self.note(path, what)

    @property
    def nbytes(self) -> int:
        """Count the bytes that the folder has on the disk. A hole in a file takes none."""
        found = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return found

    def publish(self, output: Path, overwrite: bool) -> None:
        """Give the engine its name, when the disk has it. The journal goes last: the engine is whole with or without,
        and what an older engine leaves in the folder has none."""
        for path in self.staging.rglob("*"):
            if path.is_file():
                _sync(path)
        staging.replace_directory(self.staging, output, partial(check_output, output, overwrite), overwrite)
        (output / JOURNAL).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a file system that brings no folders to the disk
            _sync(output.parent)

    def may_go_on(self, error: BaseException) -> bool:
        """Tell whether the folder is to be kept after an error: what it holds is of use to the next build."""
        if not (self.staging / JOURNAL).exists():  # nothing is written, or all of it is published
            return False
        return not self.started or (_may_pass(error) and self.nbytes >= _WORTH_KEEPING)

    def _positions(self) -> dict[str, str]:
        """Return the last position of each file."""
        done = self._journal.done if self._journal is not None else {}
        return {name: position for name, _, position in (entry.partition(" ") for entry in tuple(done))}

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))


@contextlib.contextmanager
def unfinished_build(output: Path, overwrite: bool, tell: Tell = tell_nobody) -> Iterator[UnfinishedBuild]:
    """Yield the folder in which the engine `output` is built; publish the engine on success.

    After an error, the folder is removed, unless the same build can go on with it: then `tell` gets a line about it.
    Raises EngineError if `output` may not be written, another build writes it, or the disk is full."""
    output = output.absolute()
    folder = unfinished_folder(output)
    with staging.storage_errors(output):
        build = UnfinishedBuild(folder, tell)
        with _owned(folder, output):
            try:
                check_output(output, overwrite)
                staging.remove_leftovers(output)
                yield build
                build.publish(output, overwrite)
            except BaseException as error:
                if build.may_go_on(signal_behind(error) or error):
                    if build.started:
                        tell(
                            f"kept {_size(build.nbytes)} of the unfinished engine in {folder}; the same command goes "
                            "on with it, remove the folder if nothing shall"
                        )
                    raise
                _discard(folder)
                raise
            _discard(folder)


def unfinished_folder(output: Path) -> Path:
    """Return the folder in which the engine `output` is built."""
    name = output.name
    if len(name) > _NAME_LENGTH:
        name = f"{name[:_NAME_LENGTH]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return output.parent / f".{name}.unfinished"


@contextlib.contextmanager
def _owned(folder: Path, output: Path) -> Iterator[None]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        owner = take_folder(folder)
    # the parent exists, but its file system makes no folders (/proc), or is no folder
    except (FileNotFoundError, FileExistsError) as error:
        raise staging.cannot_write(output, error) from error
    if owner is None:
        raise EngineError(
            f"another build is writing {output} in {folder}; wait until it has ended, or choose another --output"
        )
    try:
        yield
    finally:
        os.close(owner)


def _may_pass(error: BaseException) -> bool:
    """Tell whether the same build may succeed another time: it was interrupted, or lacked disk or memory.

    Not after a faulty checkpoint, or an engine that computes nonsense."""
    if isinstance(error, DeviceMemoryError) or not isinstance(error, NvlmError):
        return True
    return isinstance(error.__cause__, (OSError, DeviceMemoryError))


def _discard(folder: Path) -> None:
    (folder / "engine" / JOURNAL).unlink(missing_ok=True)  # before that of which it tells
    staging.remove(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
