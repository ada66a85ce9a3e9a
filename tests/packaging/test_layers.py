"""The contract of pyproject.toml: an import that points up makes lint-imports fail and is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = Path(sys.executable).parent / "lint-imports"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("errors.py", "nvlm_trt.cli"),
        ("model/config.py", "nvlm_trt.engine"),
        ("planner/memory.py", "nvlm_trt.builders.engine_build"),
        ("backends/base.py", "nvlm_trt.backends.onnxruntime.backend"),
        ("backends/onnxruntime/backend.py", "nvlm_trt.backends.plans.backend"),
    ],
)
def test_an_import_that_points_up_is_found(tmp_path: Path, importer: str, imported: str) -> None:
    shutil.copytree(ROOT / "nvlm_trt", tmp_path / "nvlm_trt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "nvlm_trt" / importer).open("a", encoding="utf-8") as file:
        file.write(f"\nimport {imported}\n")
    command = [LINT, "--no-logo", "--no-cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    module = "nvlm_trt." + importer.removesuffix(".py").replace("/", ".")
    assert f"{module} -> {imported}" in " ".join(result.stdout.split())
