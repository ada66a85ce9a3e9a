"""Finds the python models of a running tritonserver that have died.

The server neither restarts nor reports a stub process that is killed: it goes on calling model and server ready, while
every request to the model fails and open requests hang. So this module watches the processes themselves.
"""

from __future__ import annotations

import contextlib

import psutil

STUB = "triton_python_backend_stub"  # the program that runs a python model


def model_processes(server: int) -> dict[int, str]:
    """Lists the stub processes of tritonserver with pid `server`: pid -> model instance, "vision_encoder_0_0"."""
    stubs = {}
    with contextlib.suppress(psutil.Error):  # the server has ended
        for process in psutil.Process(server).children():
            with contextlib.suppress(psutil.Error):  # the child has ended
                arguments = process.cmdline()
                # stub, model.py, shared memory and its sizes, parent, backend folder, ..., instance name, runtime
                if len(arguments) > 2 and arguments[0].endswith(STUB):
                    stubs[process.pid] = arguments[-2]
    return stubs


def dead_children(server: int) -> set[int]:
    """Return the children of tritonserver that have ended: a stub, or the shell that was about to become one.

    tritonserver waits for no stub, so those stay."""
    dead = set()
    with contextlib.suppress(psutil.Error):  # the server has ended
        for process in psutil.Process(server).children():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    dead.add(process.pid)
    return dead


def is_running(pid: int) -> bool:
    """Returns False for a process that has ended, whether or not its parent has waited for it."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False
