"""Publishes, describes (manifest.json) and opens the engine directory: the result of a build, which a server loads.

A build writes the engine to a temporary sibling and renames it, so a directory with the engine's name is always whole.
A loader checks schema, sizes and hashes before it opens a session, and says which file is wrong and what to run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvlm_trt import strict_json
from nvlm_trt.bounded_file import CONFIG_BYTES, read_bounded
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import read_config
from nvlm_trt.progress import Bytes, Progress, no_progress
from nvlm_trt.staging import is_replaceable, published_directory

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
CALIBRATION = "calibration.json"
JOURNAL = "unfinished.journal"  # of a folder that is still being written (builders/journal.py)
# Files up to this size are hashed whenever an engine is opened, larger files when the engine is served or verified.
_QUICK_HASH_BYTES = 16 << 20
_NOT_LISTED = (MANIFEST, JOURNAL)


Record = TypeVar("Record", bound=BaseModel)  # a backend's, in the manifest


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileRecord(_Record):
    size: int
    sha256: str


class Manifest(_Record):
    schema_version: int = SCHEMA_VERSION
    model_name: str
    architecture: str
    backend: str
    runtimes: dict[str, str] = Field(default_factory=dict)  # stage -> its backend, where that is not `backend`
    precision: dict[str, str]  # component -> "fp32", "int8", ...
    limits: EngineLimits
    checkpoint_digest: str
    tool_versions: dict[str, str]
    files: dict[str, FileRecord] = Field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None
    backend_record: dict[str, Any] | None = None  # written and read by the backend alone
    accuracy_gate: dict[str, Any] | None = None  # measured before a quantised engine is published


@dataclass(frozen=True)
class Engine:
    """Holds a published engine that was checked. Its files are `path / name`."""

    path: Path
    manifest: Manifest
    config: NvlmConfig

    @classmethod
    def open(cls, path: Path | str, full_check: bool = False) -> Engine:
        """Check and open an engine directory. `full_check` hashes large weight files too (about 1 s per GB).

        Raises EngineError, and ConfigError for its config.json."""
        path = Path(path)
        manifest = _read_manifest(path)
        for name, record in manifest.files.items():
            _check_file(path / name, record, full_check)
        config = read_config(path)
        if config.architecture != manifest.architecture:
            raise EngineError(
                f"engine {path} is of NVLM-{manifest.architecture}, its config.json says NVLM-{config.architecture}; "
                "rebuild it with `nvlm-trt build`"
            )
        return cls(path, manifest, config)

    @property
    def limits(self) -> EngineLimits:
        return self.manifest.limits

    @property
    def digest(self) -> str:
        """Identify the weights and their precision. Every key of the image cache holds this digest."""
        parts = [self.manifest.checkpoint_digest, json.dumps(self.manifest.precision, sort_keys=True, allow_nan=False)]
        if self.manifest.calibration:  # static scales are part of the weights
            scales = self.manifest.files.get(CALIBRATION)
            parts += [
                json.dumps(self.manifest.calibration, sort_keys=True, allow_nan=False),
                scales.sha256 if scales else "",
            ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identify all files of the engine, their meaning and its limits. Verifying an engine does not change it, nor
        does the version of nvlm-trt that reads the engine."""
        manifest = self.manifest
        parts = [
            {name: record.sha256 for name, record in manifest.files.items()},
            manifest.limits.model_dump(),
            manifest.precision,
            manifest.backend,
            manifest.checkpoint_digest,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_record(engine: Engine, kind: type[Record]) -> Record:
    """Read the backend's record of an engine. Raises EngineError if it is missing or incomplete."""
    try:
        return kind.model_validate(engine.manifest.backend_record)
    except ValidationError:
        raise EngineError(
            f"engine {engine.path} does not say what it was built for; rebuild it with `nvlm-trt build`"
        ) from None


@contextlib.contextmanager
def publish(output: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of `output`; rename it to `output` on success, remove it on any failure.

    Without `overwrite`, an `output` that another build has published meanwhile is an error too."""
    output = Path(output).absolute()
    with published_directory(output, partial(check_output, output, overwrite), overwrite) as staging:
        yield staging


def check_output(output: Path, overwrite: bool) -> None:
    """Raise EngineError if no engine may be published as `output`."""
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise EngineError(f"{output} exists; choose another --output or pass --overwrite")
    if not is_replaceable(output, MANIFEST):
        raise EngineError(f"{output} is not an engine directory, so it is not overwritten; choose another --output")


def write_manifest(directory: Path, manifest: Manifest, progress: Progress = no_progress) -> None:
    """Hash every file below `directory` into the manifest and write it."""
    names = sorted(
        str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and p.name not in _NOT_LISTED
    )
    sizes = {name: (directory / name).stat().st_size for name in names}
    done, total = 0, Bytes(sum(sizes.values()))

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress("hashing", done, total)

    manifest.files = {
        name: FileRecord(size=size, sha256=_sha256(directory / name, report)) for name, size in sizes.items()
    }
    save_manifest(directory, manifest)


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace manifest.json atomically; the files it lists are not touched."""
    temporary = directory / f".{MANIFEST}.tmp"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, directory / MANIFEST)


def tool_versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("nvlm-trt", *packages)}


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        raw = strict_json.loads(read_bounded(file, CONFIG_BYTES).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise EngineError(f"{path} is not an engine directory (no {MANIFEST}); run `nvlm-trt build`") from None
    except OSError as error:
        raise EngineError(f"cannot read {file} ({error.strerror}); rebuild the engine with `nvlm-trt build`") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{file} is not JSON ({error}); rebuild the engine with `nvlm-trt build`") from None
    raw = _upgraded(raw) if isinstance(raw, dict) else {}
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise EngineError(
            f"{file} has schema version {version}, this nvlm-trt reads {SCHEMA_VERSION}; rebuild with `nvlm-trt build`"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EngineError(f"{file}: {where}: {first['msg']}; rebuild the engine with `nvlm-trt build`") from None


def _upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """Bring a manifest of schema version 1, whose backend record has the key `tensorrt`, to the current schema."""
    if raw.get("schema_version") != 1:
        return raw
    record = raw.pop("tensorrt", None)
    return {**raw, "schema_version": SCHEMA_VERSION, "backend_record": record}


def _check_file(path: Path, record: FileRecord, full_check: bool) -> None:
    remedy = "rebuild the engine with `nvlm-trt build`"
    if not path.is_file():
        raise EngineError(f"engine file {path} is missing; {remedy}")
    size = path.stat().st_size
    if size != record.size:
        raise EngineError(f"engine file {path} has {size} bytes, its manifest says {record.size}; {remedy}")
    if (full_check or size <= _QUICK_HASH_BYTES) and _sha256(path) != record.sha256:
        raise EngineError(f"engine file {path} does not match the sha256 in its manifest; {remedy}")


def _sha256(path: Path, report: Callable[[int], None] = lambda count: None) -> str:
    """Hash a file. `report` is called with the number of bytes that were read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            report(len(block))
    return digest.hexdigest()
