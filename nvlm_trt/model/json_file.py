"""Reads the JSON files of a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvlm_trt.bounded_file import CONFIG_BYTES, read_bounded
from nvlm_trt.errors import ConfigError


def read_json_object(path: Path, most_bytes: int = CONFIG_BYTES) -> dict[str, Any] | None:
    """Reads a JSON object; None if there is no such file. Raises ConfigError for a file that holds something else."""
    try:
        raw = json.loads(read_bounded(path, most_bytes).decode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); restore it from the checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it from the checkpoint") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold a JSON object; restore it from the checkpoint")
    return raw
