"""Reads and writes result files: JSON documents of one schema version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nvlm_trt import strict_json
from nvlm_trt.bounded_file import RESULTS_BYTES, read_bounded
from nvlm_trt.errors import NvlmError, RequestError
from nvlm_trt.staging import publish_file

KIND, SCHEMA_VERSION = "nvlm-trt bench", 1
Document = dict[str, Any]


def read_document(path: Path) -> Document:
    """Reads a result file. Raises RequestError unless it holds results of this schema version."""
    remedy = "name a file that `nvlm-trt bench --output` wrote"
    try:
        document = strict_json.loads(read_bounded(path, RESULTS_BYTES))
        if document["kind"] != KIND:
            raise ValueError(f"it is of kind {str(document['kind'])[:40]!r}")
        version = document["schema_version"]
        if version == SCHEMA_VERSION:
            _check_shape(document)
    except OSError as error:
        raise RequestError(f"cannot read results {path} ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        detail = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RequestError(f"{path} does not hold results of a benchmark ({detail}); {remedy}") from None
    if version != SCHEMA_VERSION:
        raise RequestError(
            f"{path} is of schema version {version}, this nvlm-trt reads {SCHEMA_VERSION}; measure again with this one"
        )
    return document


def write_whole(path: Path, content: str | bytes, overwrite: bool = True) -> None:
    """Writes a temporary file beside `path` and renames it, so that `path` is always whole. Raises NvlmError, also for
    a `path` that exists unless `overwrite`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        try:
            temporary.write_bytes(data)
            publish_file(temporary, path, overwrite)
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise RequestError(f"{path} exists; choose another file or pass --overwrite") from None
    except OSError as error:
        reason = error.strerror or error
        raise NvlmError(f"cannot write {path} ({reason}); free space there or choose another place") from None


def _check_shape(document: Document) -> None:
    """Reads the keys that the commands need. Raises KeyError or TypeError."""
    for part in ("status", "started", "machine", "server", "workload", "slo"):
        document[part]
    for point in document["points"]:
        point["load"]["mode"], point["status"], point["metrics"]["ok"], point["stages"]
