"""Which python models of a running tritonserver have died.

A stub process that is killed is neither restarted nor reported by the server: it goes on calling model and server
ready while every request to the model fails and requests under way hang. So the processes themselves are watched.
"""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


def model_processes(server: int) -> dict[int, str]:
    """The stub processes of the tritonserver with this process id: pid -> model instance, "vision_encoder_0_0"."""
    stubs = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and _parent_and_state(int(folder.name))[0] == server:
            arguments = _arguments(int(folder.name))
            # stub, model.py, shared memory and its sizes, parent, backend folder, ..., instance name, runtime
            if len(arguments) > 2 and arguments[0].endswith("triton_python_backend_stub"):
                stubs[int(folder.name)] = arguments[-2]
    return stubs


def is_running(pid: int) -> bool:
    """False for a process that has ended, whether or not its parent has taken notice."""
    return _parent_and_state(pid)[1] not in ("", "Z", "X")


def _parent_and_state(pid: int) -> tuple[int, str]:
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0, ""
    state, parent = stat.rpartition(")")[2].split()[:2]  # the name in parentheses may hold anything
    return int(parent), state


def _arguments(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []
