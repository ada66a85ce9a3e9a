"""Checks that the optional packages of a command are installed, and names the extra of nvlm-trt that installs them."""

from __future__ import annotations

import importlib.util

from nvlm_trt.errors import NvlmError

# extra in pyproject.toml -> module of each of its packages
EXTRAS = {
    "build": ("onnx", "onnxscript", "onnx_ir", "ml_dtypes"),
    "eval": (
        "rapidfuzz",
        "matplotlib",
        "font_caladea",
        "font_hanken_grotesk",
        "font_lato",
        "font_manrope",
        "font_source_serif_pro",
    ),
    "bench": ("matplotlib",),
    "openai": ("fastapi", "uvicorn", "sse_starlette"),
    "structured": ("llguidance",),
    "reference": ("torch",),
    "deploy": ("yaml",),
}


def missing_packages(extra: str) -> list[str]:
    """Return the modules of `extra` whose packages are not installed."""
    return [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]


def require(extra: str, purpose: str) -> None:
    """Raise NvlmError if a package of `extra` is missing. `purpose` begins the message: "building an engine".

    Imports no package, so a command can check all packages quickly before it starts to work.
    """
    if missing := missing_packages(extra):
        raise NvlmError(f"{purpose} needs {', '.join(missing)}; install with: pip install 'nvlm-trt[{extra}]'")
