"""Writes the bundle of an issue report: findings, package versions, settings, an engine's manifest; no secrets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import zipfile
from collections.abc import Sequence
from pathlib import Path

from nvlm_trt.diagnosis.finding import Finding
from nvlm_trt.engine import MANIFEST
from nvlm_trt.errors import NvlmError
from nvlm_trt.staging import publish_file, storage_errors, temporary_sibling

# The only variables whose values are written. Keys, tokens, proxies with passwords and what else a shell holds are not.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "LANG",
    "LD_LIBRARY_PATH",
    "NVIDIA_TRITON_SERVER_VERSION",
    "NVIDIA_VISIBLE_DEVICES",
    "NVLM_TRT_DEBUG",
    "NVLM_TRT_TENSORRT_LLM",
    "NVLM_TRT_TRITONSERVER",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TMPDIR",
    "VIRTUAL_ENV",
)
_ENGINE_FILES = (MANIFEST, "config.json", "calibration.json")


def write_bundle(target: Path, findings: Sequence[Finding], engine: Path | None) -> list[str]:
    """Write a zip file and return the names in it. The home folder is written as ~; of an engine, no weights.

    Raises NvlmError for a file that exists, EngineError for a place that cannot be written."""
    contents = {
        "findings.json": json.dumps([finding.model_dump() for finding in findings], indent=2, allow_nan=False),
        "system.json": json.dumps(_system(), indent=2, allow_nan=False),
        "packages.txt": "\n".join(_packages()) + "\n",
    }
    for name in _ENGINE_FILES if engine is not None else ():
        path = engine / name if engine is not None else Path(name)
        if path.is_file():
            contents[f"engine/{name}"] = path.read_text(encoding="utf-8", errors="replace")
    with storage_errors(target), temporary_sibling(target) as folder:
        written = folder / "bundle.zip"
        with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, text in contents.items():
                bundle.writestr(name, _without_home(text))
        try:
            publish_file(written, target, overwrite=False)
        except FileExistsError:
            raise NvlmError(f"{target} exists; choose another name for the bundle") from None
    return list(contents)


def _system() -> dict[str, object]:
    """Describe the system without its name or its user."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _packages() -> list[str]:
    found = {(dist.metadata["Name"] or "?", dist.version) for dist in importlib.metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found, key=lambda entry: entry[0].lower())]


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
