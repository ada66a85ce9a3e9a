from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.triton import install as triton_install
from nvlm_trt.serving.triton.install import ENVIRONMENT_VARIABLE, check_stub, find_libpython, find_triton


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def installed_at(root: Path) -> Path:
    """Makes the folders of NVIDIA's container, without their contents."""
    for folder in ("bin", "backends/python", "lib"):
        (root / folder).mkdir(parents=True)
    (root / "bin" / "tritonserver").touch()
    return root


def test_the_install_found_runs_and_fits_this_python(tmp_path: Path) -> None:
    install = find_triton()
    backends, environment = install.prepare(tmp_path)
    assert (backends / "python" / "libtriton_python.so").is_file()
    linked = subprocess.run(["ldd", install.executable], env=environment, capture_output=True, text=True).stdout
    assert "not found" not in linked
    stub = backends / "python" / "triton_python_backend_stub"
    linked = subprocess.run(["ldd", stub], env=environment, capture_output=True, text=True).stdout
    assert "not found" not in linked
    assert f"libpython{sys.version_info.major}.{sys.version_info.minor}" in linked


@pytest.mark.parametrize("named", ["", "bin/tritonserver"])
def test_the_environment_variable_names_a_folder_or_the_program(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = installed_at(tmp_path / "triton")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(root / named))
    assert find_triton().executable == root / "bin" / "tritonserver"


def test_a_variable_with_a_wrong_path_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "/no/such/place")
    with pytest.raises(ServerError, match="/no/such/place"):
        find_triton()


def test_the_container_comes_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_install, "_CONTAINER_ROOT", installed_at(tmp_path))
    assert find_triton().executable == tmp_path / "bin" / "tritonserver"


def test_the_error_without_tritonserver_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton_install, "_CONTAINER_ROOT", tmp_path / "nothing")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    monkeypatch.delitem(sys.modules, "pytriton", raising=False)
    with pytest.raises(ServerError, match="pip install nvidia-pytriton") as raised:
        find_triton()
    assert ENVIRONMENT_VARIABLE in str(raised.value)


def test_a_python_that_the_wheel_does_not_serve_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton_install, "_CONTAINER_ROOT", tmp_path / "nothing")
    monkeypatch.setattr(triton_install, "_wheel_install", lambda: None)
    monkeypatch.setattr(triton_install, "_TOO_NEW", sys.version_info[:2])
    with pytest.raises(ServerError, match=r"serves with Python 3\.10 to 3\.12, this is 3\.") as raised:
        find_triton()
    assert "\n" not in str(raised.value)


def test_a_stub_of_another_python_is_an_error(tmp_path: Path) -> None:
    stub = tmp_path / "triton_python_backend_stub"
    with pytest.raises(ServerError, match="no stub"):
        check_stub(stub)
    stub.write_bytes(b"\x7fELF\0libpython3.4.so.1.0\0")
    with pytest.raises(ServerError, match=r"runs models in Python 3\.4"):
        check_stub(stub)


def test_libpython_is_this_pythons() -> None:
    path = find_libpython()
    assert path.is_file()
    assert f"python{sys.version_info.major}.{sys.version_info.minor}" in path.name


def test_a_missing_libpython_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_install, "_PYTHON", "3.99")
    with pytest.raises(ServerError, match="apt-get install libpython3.99"):
        find_libpython()


def test_other_backends_of_an_install_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = installed_at(tmp_path / "triton")
    (root / "backends" / "tensorrt").mkdir()
    python = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    (root / "backends" / "python" / "triton_python_backend_stub").write_bytes(python.encode())
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(root))
    (tmp_path / "run").mkdir()
    backends, environment = find_triton().prepare(tmp_path / "run")
    assert {path.name for path in backends.iterdir()} == {"python", "tensorrt"}
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(root / "lib")
