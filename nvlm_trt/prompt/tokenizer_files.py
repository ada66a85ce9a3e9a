"""Finds the files of a tokenizer in a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvlm_trt.bounded_file import TOKENIZER_BYTES, read_bounded
from nvlm_trt.errors import ConfigError

TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file. Raises ConfigError for a file that holds something else."""
    try:
        raw = json.loads(read_bounded(path, TOKENIZER_BYTES).decode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); restore it from the checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it from the checkpoint") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold a JSON object; restore it from the checkpoint")
    return raw


def chat_template_file(directory: Path) -> str | None:
    """Return the name of the file that has the chat template; None without one."""
    for name in _TEMPLATE_FILES:
        if (directory / name).is_file():
            return name
    try:
        found = read_json_object(directory / TOKENIZER_CONFIG)
    except ConfigError:
        return None
    return TOKENIZER_CONFIG if found and found.get("chat_template") else None
