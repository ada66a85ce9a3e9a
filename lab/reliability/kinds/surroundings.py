"""Starts a server in odd surroundings: ports, locale, streams, environment, clock, user."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

from lab.reliability.kind import Kind, kind
from lab.reliability.load import answer_tokens
from lab.reliability.place import Place, require_answers
from lab.reliability.promise import require

KINDS: list[Kind] = []
_START_SECONDS = 30.0
_JUMP = '''"""Moves the wall clock of a process by the seconds in the file that NVLM_TRT_CLOCK names."""
import os, time
_now, _path = time.time, os.environ.get("NVLM_TRT_CLOCK", "")
def _moved():
    try:
        return _now() + float(open(_path).read() or 0)
    except OSError:
        return _now()
time.time = _moved
'''


@kind(KINDS, "a port in use", "serve ends with status 2 and one line that names the port")
def _port(place: Place) -> None:
    for option in ("--grpc-port", "--http-port", "--metrics-port"):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = str(listener.getsockname()[1])
            last = place.start(arguments=(option, port)).require_ended(2, 120)
        require(port in last, f"{option}: the line does not name the port: {last}")


@kind(KINDS, "a host that is not this machine's", "serve ends with status 2 and one line")
def _host(place: Place) -> None:
    for host in ("192.0.2.1", "absent.invalid", "::1", ""):
        place.start(arguments=("--host", host)).require_ended(2, 120)


@kind(KINDS, "locale C, no UTF-8", "the server answers; ask prints, with ? for what the terminal lacks")
def _locale(place: Place) -> None:
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    served = place.serve(environment=plain)
    require_answers(served)
    place.ask(served, "--max-tokens", "8", environment=plain)


@kind(KINDS, "standard input closed", "the server answers, SIGTERM ends it with status 0")
def _no_stdin(place: Place) -> None:
    require_answers(place.serve(wrapper=("sh", "-c", 'exec "$@" <&-', "sh")))


@kind(KINDS, "standard error closed", "the server answers, SIGTERM ends it with status 0")
def _no_stderr(place: Place) -> None:
    require_answers(place.serve(wrapper=("sh", "-c", 'exec "$@" <&- 2>&-', "sh")))


@kind(KINDS, "standard output is a pipe that nobody reads", "serve goes on without its line; nothing is left")
def _broken_pipe(place: Place) -> None:
    read, write = os.pipe()
    os.close(read)
    served = place.start(stdout=write)
    os.close(write)
    try:
        status = served.process.wait(_START_SECONDS)
    except subprocess.TimeoutExpired:
        return  # check_left stops it
    require(False, f"serve ended with status {status}: {served.errors.strip()[-300:]}")


@kind(KINDS, "standard output closed", "serve goes on and ends with status 0, or with one line; nothing is left")
def _no_stdout(place: Place) -> None:
    served = place.start(wrapper=("sh", "-c", 'exec "$@" >&-', "sh"))
    try:
        served.process.wait(_START_SECONDS)
    except subprocess.TimeoutExpired:
        return
    served.require_ended(2)


@kind(KINDS, "an environment of 1 MiB", "the server answers")
def _environment(place: Place) -> None:
    require_answers(place.serve(environment={f"FILLER_{number}": "x" * 100_000 for number in range(10)}))


@kind(KINDS, "an environment with a proxy and Python's own variables", "the server answers")
def _variables(place: Place) -> None:
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "grpc_proxy"), "http://192.0.2.1:1")
    odd = {"PYTHONWARNINGS": "error::DeprecationWarning", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    require_answers(place.serve(environment={**proxy, **odd, "no_proxy": ""}))


@kind(KINDS, "the wall clock jumps a day ahead, then two back", "requests go on, the answers stay the same")
def _clock(place: Place) -> None:
    site, moved = place.folder / "site", place.folder / "clock"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_JUMP)
    moved.write_text("0")
    paths = os.pathsep.join([str(site), str(Path(__file__).resolve().parents[3])])
    served = place.serve(environment={"PYTHONPATH": paths, "NVLM_TRT_CLOCK": str(moved)})
    before = answer_tokens(served.address)
    load = place.load(served)
    for seconds in ("86400", "-86400"):
        moved.write_text(seconds)
        require(answer_tokens(served.address) == before, "another answer after the jump")
    load.require_finished()


@kind(KINDS, "the current folder removed", "the server answers")
def _no_folder(place: Place) -> None:
    folder = place.folder / "current"
    folder.mkdir()
    served = place.start(cwd=folder)
    shutil.rmtree(folder)
    require_answers(served.wait_until_ready())
