"""Keeps the results file of an evaluation: appends answers to FILE.partial as they come, writes FILE at the end.

FILE.partial is JSONL: a header that says which samples, model and options the answers belong to, then one line per
answer. FILE is one JSON object that holds the same header, the summary and every answer.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from nvlm_trt import strict_json
from nvlm_trt.bounded_file import RESULTS_BYTES, read_bounded
from nvlm_trt.errors import NvlmError, RequestError

SCHEMA_VERSION = 1
Header = dict[str, Any]  # "schema_version", "samples", "model", "options"


@dataclass(frozen=True)
class SavedResults:
    """Holds the content of a results file, finished or not."""

    path: Path
    header: Header
    answers: dict[str, str] = field(default_factory=dict)  # name -> answer

    def check(self, header: Header, same: Sequence[str], remedy: str) -> None:
        """Raises RequestError unless the parts `same` of both headers are equal."""
        for part in same:
            there, here = self.header.get(part), header[part]
            if there != here:
                raise RequestError(
                    f"{self.path} comes from {_NAMES[part]} ({_brief(there)} there, {_brief(here)} here); {remedy}"
                )


_NAMES = {
    "schema_version": "another version of nvlm-trt",
    "samples": "another sample set",
    "model": "another model",
    "options": "a run with other options",
}


class ResultsFile:
    """Keeps the answers of one run, as a context manager. Writes no file if `path` is None."""

    def __init__(self, path: Path | None, header: Header, names: Sequence[str]) -> None:
        """Takes over the answers of an earlier run with this header. Raises RequestError for a file of another run."""
        self.header = header
        self._path = path
        self.answers: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._whole_bytes = 0  # in whole lines of FILE.partial; at most the beginning of a line follows
        if path is not None:
            self._take_up(path, names)

    @property
    def partial(self) -> Path | None:
        return None if self._path is None else partial_path(self._path)

    def __enter__(self) -> ResultsFile:
        if self.partial is not None:
            with _writing(self.partial):
                self.partial.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.partial.open("ab")
                self._file.truncate(self._whole_bytes)
            if not self._whole_bytes:
                self._append(self.header)
                for name, answer in self.answers.items():  # from a finished FILE
                    self._append({"name": name, "answer": answer})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: str, answer: str, score: float) -> None:
        self.answers[name] = answer
        self._append({"name": name, "answer": answer, "score": score})

    def publish(self, document: Mapping[str, Any]) -> None:
        """Writes FILE, whole or not at all, and removes FILE.partial, whose answers FILE holds."""
        if self._path is None or self.partial is None:
            return
        with _writing(self._path):
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
            self.partial.unlink(missing_ok=True)

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._file is not None and self.partial is not None:
            with _writing(self.partial):
                self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
                self._file.flush()

    def _take_up(self, path: Path, names: Sequence[str]) -> None:
        if os.path.isdir(path):
            raise RequestError(f"{path} is a folder; name a file with --output")
        if os.path.exists(path):
            saved = read_results(path)
        elif os.path.exists(partial_path(path)):
            saved, self._whole_bytes = _read_partial(partial_path(path))
            if not self._whole_bytes:
                return  # interrupted within the header
        else:
            return
        remedy = "choose another --output, or remove that file"
        saved.check(self.header, tuple(_NAMES), remedy)
        if unknown := saved.answers.keys() - set(names):
            raise RequestError(f"{saved.path} answers {min(unknown)!r}, which is not in the sample set; {remedy}")
        self.answers = saved.answers


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def read_results(path: Path) -> SavedResults:
    """Reads a finished results file. Raises RequestError for anything else."""
    remedy = "name a file that `nvlm-trt eval --output` wrote"
    try:
        document = strict_json.loads(read_bounded(path, RESULTS_BYTES))
        answers = {entry["name"]: entry["answer"] for entry in document["answers"]}
        header = {part: document[part] for part in _NAMES}
    except OSError as error:
        raise RequestError(f"cannot read results {path} ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RequestError(f"{path} is not a results file ({detail}); {remedy}") from None
    return SavedResults(path, header, answers)


def _read_partial(path: Path) -> tuple[SavedResults, int]:
    """Returns the content of FILE.partial and the bytes of its whole lines. Leaves out an incomplete last line."""
    try:
        data = read_bounded(path, RESULTS_BYTES)
    except OSError as error:
        raise NvlmError(f"cannot read {path} ({error.strerror}); make it readable or remove it") from None
    whole = data[: data.rfind(b"\n") + 1]
    answers: dict[str, str] = {}
    header: Header = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = strict_json.loads(line)
            if number == 1:
                header = dict(record)
            else:
                answers[str(record["name"])] = str(record["answer"])
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"{path} line {number} is damaged; remove that line or the file") from None
    return SavedResults(path, header, answers), len(whole)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise NvlmError(f"cannot write {path} ({reason}); free space there or choose another --output") from None


def _brief(value: Any) -> str:
    """Shortens a part of a header to a few words."""
    if isinstance(value, dict):
        return " ".join(f"{key}={str(item)[:12] if key == 'digest' else item}" for key, item in value.items())
    return str(value)
