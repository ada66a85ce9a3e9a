"""Makes the files of the fuzz: number n of a seed is the same file in every run and every process."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lab.reliability.mutations import mutate
from lab.reliability.valid_files import ValidFile, large_files, valid_files

_VALID = 0.05  # share of files that stay as they are
_LARGE_EVERY = 500


@dataclass(frozen=True)
class FileCase:
    """Holds one file. `read`: True if the product has to decode it; None if it may refuse it."""

    made: str
    data: bytes
    read: bool | None


def file_case(seed: int, number: int) -> FileCase:
    """Makes the file of a number."""
    source = random.Random(f"{seed} file {number}")
    files = valid_files()
    if number % _LARGE_EVERY == _LARGE_EVERY - 1:
        return _unchanged(source.choice(large_files()))
    file, other = source.choice(files), source.choice(files)
    if source.random() < _VALID:
        return _unchanged(file)
    data, names = mutate(source, file.data, other.data)
    return FileCase(f"{file.name}: {', '.join(names)}", data, None)


def _unchanged(file: ValidFile) -> FileCase:
    return FileCase(file.name, file.data, True if file.read else None)
