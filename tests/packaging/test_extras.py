"""Asking and serving run without the optional packages, and a command that lacks one names it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error
from packaging.requirements import Requirement

from nvlm_trt.backends.tensorrt_llm.contract import VERSION
from nvlm_trt.extras import EXTRAS, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "docs" / "images" / "receipt.png"
OPTIONAL = {module for modules in EXTRAS.values() for module in modules} - {"ml_dtypes"}  # ONNX Runtime may import it

# Runs `code` after it: importing an optional package fails, and one that was imported all the same is an error.
FORBID = f"""
import sys
optional = {sorted(OPTIONAL)}
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in optional:
            raise ImportError(f"{{name}} is forbidden here")
sys.meta_path.insert(0, Forbid())
"""
CHECK = "\nassert not set(sys.modules) & set(optional), set(sys.modules) & set(optional)\n"


def run_without_optional_packages(code: str) -> str:
    command = [sys.executable, "-c", FORBID + code + CHECK]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def lack(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Makes modules look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name in modules else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
def test_ask_an_engine_imports_no_optional_package(engine: Callable[[str], Path], name: str) -> None:
    arguments = ["nvlm-trt", "ask", "Total?", "--image", str(IMAGE), "--engine", str(engine(name)), "--max-tokens", "2"]
    run_without_optional_packages(
        f"""
from nvlm_trt import cli
sys.argv = {arguments!r}
try:
    cli.main()
except SystemExit as exit:
    assert not exit.code, exit.code
assert "onnxruntime" in sys.modules
"""
    )


def test_what_serves_imports_no_optional_package() -> None:
    """Imports the modules that the server's process and Triton's python models import."""
    models = [path for path in (ROOT / "triton_repo").glob("*/1/*.py") if path.is_file()]
    imported = {name for path in models for name in re.findall(r"^from (nvlm_trt\S*) import", path.read_text(), re.M)}
    assert {f"nvlm_trt.serving.triton.models.{name}" for name in ("chat", "tiling", "vision_encoder")} == imported
    serving = {"nvlm_trt.serving.foreground", "nvlm_trt.serving.triton.guard", "nvlm_trt.serving.client"}
    backends = {"nvlm_trt.backends.onnxruntime.backend", "nvlm_trt.backends.plans.backend"}
    run_without_optional_packages("".join(f"import {name}\n" for name in sorted(imported | serving | backends)))


def test_the_hook_forbids_imports() -> None:
    with pytest.raises(AssertionError, match="onnx is forbidden here"):
        run_without_optional_packages("import onnx")


def extras_of_the_package() -> dict[str, list[Requirement]]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {extra: [Requirement(line) for line in lines] for extra, lines in extras.items()}


def packages_of(extra: str) -> set[str]:
    """Lists the packages of an extra and of the extras of this package that it names."""
    extras = extras_of_the_package()
    packages = set()
    for requirement in extras[extra]:
        packages |= set().union(*map(packages_of, requirement.extras)) or {requirement.name}
    return packages


def test_extras_are_those_of_the_package() -> None:
    modules_of = {"PyYAML": "yaml"}
    for extra, modules in EXTRAS.items():
        packages = [requirement.name for requirement in extras_of_the_package()[extra]]
        assert [modules_of.get(package, package.replace("-", "_")) for package in packages] == list(modules)


def test_stubs_are_in_their_own_extras_alone() -> None:
    """pip cannot install these where NVIDIA's index is out of reach, so no other extra may bring one."""
    extras = extras_of_the_package()
    assert str(next(line for line in extras["tensorrt"] if line.name == "tensorrt").specifier) == ">=11"
    assert [str(line) for line in extras["tensorrt-llm"]] == [f"tensorrt-llm=={VERSION}"]
    stubs = {"tensorrt", "tensorrt-llm"}
    assert {extra for extra in extras if packages_of(extra) & stubs} == stubs
    assert packages_of("test") >= packages_of("tensorrt") - stubs
    assert packages_of("test") >= set().union(*(packages_of(extra) for extra in extras if extra not in stubs))


@pytest.mark.parametrize("listed", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_stubs_are_not_in_the_lists_of_versions(listed: Path) -> None:
    names = {line.partition("==")[0] for line in listed.read_text().splitlines() if not line.startswith("#")}
    assert not names & {"tensorrt", "tensorrt-llm", "tensorrt-cu13", "tensorrt-cu13-libs"}


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require("build", "building")
    lack(monkeypatch, "onnx", "onnx_ir")
    with pytest.raises(Exception, match=r"^building needs onnx, onnx_ir; .*pip install 'nvlm-trt\[build\]'$"):
        require("build", "building")


@pytest.mark.parametrize(
    ("extra", "module", "command"),
    [
        ("build", "onnxscript", ("build", "--checkpoint", "c", "--output", "o")),
        ("build", "ml_dtypes", ("init-checkpoint", "--preset", "nvlm-d-tiny", "o")),
        ("eval", "font_lato", ("eval", "--engine", "e")),
        ("eval", "matplotlib", ("build", "--checkpoint", "c", "--output", "o", "--precision", "int8")),
        ("eval", "rapidfuzz", ("tinydocs", "--output", "o")),
        ("bench", "matplotlib", ("bench", "--url", "grpc://127.0.0.1:9", "--plots", "p")),
        ("deploy", "yaml", ("deploy", "e", "--target", "slurm")),
        ("reference", "torch", ("eval", "--reference", str(ROOT / "checkpoints" / "nvlm-d-tiny"), "--count", "1")),
    ],
)
def test_a_command_that_lacks_a_package(
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    extra: str,
    module: str,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    lack(monkeypatch, module)
    assert_one_line_error(run_cli(*command), module, f"pip install 'nvlm-trt[{extra}]'")
    assert not (tmp_path / "o").exists()


def test_verify_without_torch(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch, engine: Callable[[str], Path], checkpoint: Callable[[str], Path]
) -> None:
    lack(monkeypatch, "torch")
    result = run_cli("verify", engine("nvlm-d-tiny"), "--checkpoint", checkpoint("nvlm-d-tiny"))
    assert_one_line_error(result, "torch", "pip install 'nvlm-trt[reference]'")
