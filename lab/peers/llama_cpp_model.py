"""Loads a GGUF file into llama.cpp, which then prints errors only."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp as llama

ERROR = 4  # GGML_LOG_LEVEL_ERROR


@llama.llama_log_callback
def log(level: int, text: bytes, data: object) -> None:
    """Prints errors only."""
    if level == ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def load_model(path: Path) -> Any:
    llama.llama_log_set(log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp does not load {path}"
    return model
