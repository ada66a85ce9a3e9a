"""Runs functions in another process, for settings that must precede an import: Triton's mode, TensorRT's library."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


@contextlib.contextmanager
def child_process(environment: dict[str, str], import_from: str | None = None) -> Iterator[ProcessPoolExecutor]:
    """`submit(function, *arguments).result()` runs in one process that starts with this environment added.

    `import_from` goes before its other import paths."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            if import_from is not None:
                patch.syspath_prepend(import_from)  # a spawned process takes over this list, not PYTHONPATH
            executor.submit(os.getpid).result()  # starts it
        yield executor
