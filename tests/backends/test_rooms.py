"""A backend's decisions are in its room: no module outside compares a backend's name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvlm_trt.backends.table import backend_names, find_backend
from nvlm_trt.errors import EngineError

ROOT = Path(__file__).parents[2]
PRODUCT = ("nvlm_trt", "builders", "plugins", "triton_repo")


def modules_outside_rooms() -> Iterator[Path]:
    rooms = [ROOT / "nvlm_trt" / "backends" / name.replace("-", "_") for name in backend_names()]
    assert all(room.is_dir() for room in rooms)
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(path.is_relative_to(room) for room in rooms):
                yield path


def compared_names(tree: ast.AST) -> Iterator[str]:
    """Backends' names in comparisons, in match cases, and as keys that something is looked up by."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        for part in parts:
            for constant in ast.walk(part):
                if isinstance(constant, ast.Constant) and constant.value in backend_names():
                    yield str(constant.value)


def test_no_module_outside_a_room_compares_a_backends_name() -> None:
    paths = list(modules_outside_rooms())
    assert len(paths) > 100
    found = {str(path.relative_to(ROOT)): list(compared_names(ast.parse(path.read_text()))) for path in paths}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "code",
    [
        'if engine.manifest.backend == "tensorrt": pass',
        'size = {"onnxruntime": 2}[backend]\nchunk = _CHUNK["tensorrt"]',
        'if (backend, letter) == ("tensorrt", "X"): pass',
        'match backend:\n    case "onnxruntime": pass',
        'if backend in ("tensorrt", "other"): pass',
    ],
)
def test_a_comparison_would_be_found(code: str) -> None:
    assert list(compared_names(ast.parse(code)))


@pytest.mark.parametrize("name", backend_names())
def test_every_room_exports_a_spec_of_its_name(name: str) -> None:
    spec = find_backend(name)
    assert spec.name == spec.precisions.backend == name
    assert spec.precisions.default in spec.precisions.names
    assert spec.open or spec.open_generator
    assert spec.prefill_chunk > 0


def test_a_probe_names_the_runtime_or_says_how_to_get_it() -> None:
    assert find_backend("onnxruntime").probe().startswith("ONNX Runtime 1.")
    with pytest.raises(EngineError, match="TensorRT.*(pip install|nvcr.io|GPU)"):
        find_backend("tensorrt").probe()
