"""build.sh where the only Python on PATH is too new: it gets a 3.12 through uv, or says in one line what to install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "dirname", "cat", "mkdir", "touch", "sha256sum", "cut", "env", "rm")

# Stands in for Python 3.13: build.sh asks it for its version, makes a virtual environment with it, and runs pip there.
TOO_NEW = f"""#!/bin/sh
case "$*" in *"(3, 10)"*) exit 1 ;; esac
exec {sys.executable} "$@"
"""
# Stands in for uv, whose Pythons come from GitHub: it "installs" the Python that runs this test.
UV = f"""#!/bin/sh
echo "$@" >>"$UV_PYTHON_INSTALL_DIR.calls"
case "$2" in find) echo {sys.executable} ;; esac
"""
OFFLINE_UV = "#!/bin/sh\necho 'error: Failed to download' >&2\nexit 1\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("build.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder for PATH: the tools that build.sh calls, and a python3 that is too new."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    write_program(folder / "python3", TOO_NEW)
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def build(checkout: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "HOME": os.environ["HOME"], "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = ["./build.sh", "--help"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def assert_one_line_error(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 2
    notice, error = result.stderr.splitlines()
    assert notice.startswith("No Python 3.10, 3.11 or 3.12 on PATH")
    assert error.startswith("error: no Python 3.10, 3.11 or 3.12 on PATH")
    assert "install Python 3.12 or set PYTHON=" in error


def test_the_python_that_uv_fetches_makes_the_environment(checkout: Path, path: Path) -> None:
    write_program(path / "uv", UV)
    result = build(checkout, path)
    calls = (checkout / ".uv" / "python.calls").read_text().splitlines()
    assert calls[0].startswith("python install")
    assert calls[0].endswith("3.12")
    assert (checkout / ".venv" / "bin" / "python").exists()
    # the packages come next, and this test forbids pip the index
    assert "error: pip could not install requirements/runtime" in result.stderr


def test_a_uv_without_network_is_one_line(checkout: Path, path: Path) -> None:
    write_program(path / "uv", OFFLINE_UV)
    assert_one_line_error(build(checkout, path))
    assert not (checkout / ".venv").exists()
    assert "Failed to download" in (checkout / ".uv" / "log").read_text()


def test_a_uv_that_pip_cannot_install_is_one_line(checkout: Path, path: Path) -> None:
    assert_one_line_error(build(checkout, path))
    assert "uv" in (checkout / ".uv" / "log").read_text()
