"""Finds a tritonserver and makes it run python models in this interpreter's environment.

The nvidia-pytriton wheel brings tritonserver with a python backend stub per Python version. NVIDIA's container has
tritonserver in /opt/tritonserver, with the stub of the container's Python.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from nvlm_trt.errors import ServerError

ENVIRONMENT_VARIABLE = "NVLM_TRT_TRITONSERVER"
_CONTAINER_ROOT = Path("/opt/tritonserver")
_STUB = "triton_python_backend_stub"
_TOO_NEW = (3, 13)  # the first Python without a stub in the wheel
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class TritonInstall:
    """Where the parts of a tritonserver are."""

    executable: Path
    backends: Path
    stub: Path  # runs python models; linked to one version of libpython
    libraries: Path

    def prepare(self, directory: Path) -> tuple[Path, dict[str, str]]:
        """Makes a backend directory in `directory`. Returns it and the environment to start the server with, in
        `directory`.

        Raises ServerError if the stub does not fit this Python.
        """
        check_stub(self.stub)
        backends, libraries = directory / "backends", directory / "lib"
        (backends / "python").mkdir(parents=True)
        for backend in self.backends.iterdir():
            if backend.name != "python":
                (backends / backend.name).symlink_to(backend)
        for file in (self.backends / "python").iterdir():
            if file.is_file() and file.name != _STUB:
                (backends / "python" / file.name).symlink_to(file)
        (backends / "python" / _STUB).symlink_to(self.stub)
        # links libpython alone: its folder may hold other versions of libraries that the server brings itself
        libraries.mkdir()
        libpython = find_libpython()
        (libraries / libpython.name).symlink_to(libpython)
        return backends, self._environment(libraries)

    def _environment(self, *libraries: Path) -> dict[str, str]:
        environment = dict(os.environ)
        inherited = environment.get("LD_LIBRARY_PATH")
        # also by name, from the folder that the server is started in: a colon in a path would end it
        named = [library.name for library in libraries]
        paths = [str(self.libraries), *named, *map(str, libraries), *([inherited] if inherited else [])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
        # The stub imports the packages of the first python3 on PATH; this makes it a virtualenv's.
        executables = str(Path(sys.executable).absolute().parent)
        environment["PATH"] = os.pathsep.join([executables, environment.get("PATH", os.defpath)])
        return environment


def find_triton() -> TritonInstall:
    """Looks at NVLM_TRT_TRITONSERVER, then /opt/tritonserver, then the wheel. Raises ServerError if none is there."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        path = Path(named).absolute()
        root = path.parent.parent if path.is_file() else path
        if not (root / "bin" / "tritonserver").is_file():
            raise ServerError(f"no tritonserver at {ENVIRONMENT_VARIABLE}={named}; name its folder, or unset it")
        return _install_at(root)
    if (_CONTAINER_ROOT / "bin" / "tritonserver").is_file():
        return _install_at(_CONTAINER_ROOT)
    install = _wheel_install()
    if install is None and sys.version_info >= _TOO_NEW:
        raise ServerError(
            f"tritonserver's wheel serves with Python 3.10 to 3.12, this is {_PYTHON}; install nvlm-trt for one of "
            "those and serve this engine there (an engine does not depend on the Python version), or set "
            f"{ENVIRONMENT_VARIABLE} to a tritonserver for {_PYTHON}"
        )
    if install is None:
        raise ServerError(
            "tritonserver not found; `pip install nvidia-pytriton` (Linux, x86-64), run in NVIDIA's Triton container, "
            f"or set {ENVIRONMENT_VARIABLE} to the folder that holds bin/tritonserver"
        )
    return install


def check_stub(stub: Path) -> None:
    """Raises ServerError unless the stub exists and is built for the running Python."""
    if not stub.is_file():
        raise ServerError(
            f"tritonserver's python backend has no stub for Python {_PYTHON} ({stub}); use another Python"
        )
    match = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes())
    if match and match[1].decode() != _PYTHON:
        raise ServerError(
            f"{stub} runs models in Python {match[1].decode()}, this is {_PYTHON}; install nvlm-trt for that Python, "
            f"or set {ENVIRONMENT_VARIABLE} to another tritonserver"
        )


def find_libpython() -> Path:
    """Finds the running Python's shared library, which the stub links. Raises ServerError if there is none."""
    name = f"libpython{_PYTHON}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch:
        folders += [f"{folder}/{multiarch}" for folder in folders if folder] + [f"/usr/lib/{multiarch}"]
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return (Path(folder) / name).resolve()
    raise ServerError(
        f"{name} not found, which tritonserver's python backend needs; install it (`apt-get install libpython{_PYTHON}`"
        " on Debian and Ubuntu), or use a Python built with --enable-shared"
    )


def _install_at(root: Path) -> TritonInstall:
    backends = root / "backends"
    return TritonInstall(
        executable=root / "bin" / "tritonserver",
        backends=backends,
        stub=backends / "python" / _STUB,
        libraries=root / "lib",
    )


def _wheel_install() -> TritonInstall | None:
    """Finds the wheel without importing pytriton, which would start more than is needed."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    return TritonInstall(
        executable=root / "bin" / "tritonserver",
        backends=root / "backends",
        stub=root / "python_backend_stubs" / _PYTHON / _STUB,
        libraries=package.parent / "nvidia_pytriton.libs",
    )
