"""Finds the folder for temporary files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nvlm_trt.errors import EngineError


def temporary_folder() -> Path:
    """Return the folder for temporary files: $TMPDIR, /tmp, or another that Python's tempfile finds.

    Raises EngineError where none can be written."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise EngineError(
            "no folder for temporary files can be written (TMPDIR, /tmp, /var/tmp); free space there or set TMPDIR to "
            "another folder"
        ) from None
