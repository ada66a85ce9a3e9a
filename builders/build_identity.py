"""Says what a build is, to tell whether an unfinished folder is of the same build: the bytes of the engine follow from
it. Options that only judge an engine, such as those of the accuracy gate, are no part of it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nvlm_trt
from nvlm_trt.bounded_file import CALIBRATION_BYTES, read_bounded
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.engine import CALIBRATION, tool_versions
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import needs_calibration

if TYPE_CHECKING:
    from nvlm_trt.builders.engine_build import QuantizationOptions

_FORMAT = 1  # of the journal's lines
_NUMBERS = ("numpy", "ml-dtypes")  # round the weights
_CODE = ("backends", "builders", "checkpoint", "model")  # folders of this package that decide what is written
_SIDE_FILES = ("*.json", "*.txt")  # of a checkpoint: config and tokenizer


def identity(
    source: EngineSource,
    backend: str,
    options: Mapping[str, Any],
    precisions: Mapping[str, str],
    quantization: QuantizationOptions,
    tools: Sequence[str],
) -> dict[str, Any]:
    """Collect all that the bytes of an engine follow from. Raises EngineError for a calibration that cannot be read."""
    folder = source.checkpoint_dir
    side_files = sorted(path for pattern in _SIDE_FILES for path in folder.glob(pattern))
    return {
        "format": _FORMAT,
        "checkpoint": source.digest,
        "weight files": source.stamp,
        "side files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in side_files],
        "backend": backend,
        "options": dict(options),
        "limits": source.limits.model_dump(),
        "precisions": dict(precisions),
        "calibration": _calibration(quantization) if needs_calibration(precisions) else None,
        "tools": tool_versions(*tools, *_NUMBERS),
        "python": platform.python_version(),
        "code": _code_digest(),
    }


def _calibration(quantization: QuantizationOptions) -> list[Any]:
    path = quantization.calibration
    return [
        None if path is None else _digest(path),
        quantization.calibration_samples,
        quantization.calibrate_by,
        quantization.activation_range,
        quantization.smoothquant_alpha,
    ]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bounded(path, CALIBRATION_BYTES)).hexdigest()
    except OSError as error:
        raise EngineError(
            f"cannot read calibration {path} ({error.strerror}); name a JSONL file of samples or a saved {CALIBRATION}"
        ) from None


def _code_digest() -> str:
    """Hash the code: the version of a working copy says little."""
    digest = hashlib.sha256()
    root = Path(nvlm_trt.__file__).parent
    for folder in _CODE:
        for path in sorted((root / folder).resolve().rglob("*.py")):  # builders is a link in a working copy
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
