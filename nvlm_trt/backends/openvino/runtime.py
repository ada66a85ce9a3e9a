"""Loads OpenVINO, and says why this machine cannot use it."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any

from nvlm_trt.errors import EngineError

OLDEST = (2026, 4)  # the oldest release that the tests have run with
_CONVERTER = "openvino.tools.ovc"


def version() -> str:
    """Return the version of the installed OpenVINO, without an import. Raises EngineError if it is missing or too
    old."""
    remedy = f"pip install 'openvino>={OLDEST[0]}.{OLDEST[1]}'"
    try:
        found = importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        raise EngineError(f"OpenVINO is not installed; {remedy}") from None
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise EngineError(f"OpenVINO {found} is too old; {remedy}")
    return found


def load() -> Any:
    """Import OpenVINO without its model converter, whose import reports the use of OpenVINO to a server of its vendor.

    Raises EngineError if OpenVINO is missing, too old, or cannot be loaded."""
    found = version()
    is_blocked = _CONVERTER not in sys.modules
    if is_blocked:
        sys.modules[_CONVERTER] = None  # type: ignore[assignment]  # Python's way to make an import fail
    try:
        return importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        raise EngineError(f"OpenVINO {found} cannot be imported ({error}); reinstall it with pip") from None
    finally:
        if is_blocked:
            del sys.modules[_CONVERTER]
