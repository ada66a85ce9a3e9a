"""Takes space away: in TMPDIR, in /dev/shm, at the output of a build, and folders altogether."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import shutil
from pathlib import Path

from lab.reliability.kind import Kind, kind
from lab.reliability.place import Place, end_of, namespace, require_answers
from lab.reliability.promise import require
from lab.reliability.served import Served, limited

KINDS: list[Kind] = []
REFUSES = "serve ends with status 2 and one line that says what to do"


@kind(
    KINDS, "the server's temporary folder removed", "requests go on, the server answers, SIGTERM ends it with status 0"
)
def _removed(place: Place) -> None:
    served = place.serve()
    load = place.load(served)
    for folder in served.traces.folder.iterdir():
        shutil.rmtree(folder, ignore_errors=True)
    load.require_finished()
    require_answers(served)


@kind(KINDS, "TMPDIR full at the start", REFUSES)
def _full_at_start(place: Place) -> None:
    served = place.start(wrapper=_tmpfs(_tmpdir(place), "4k"))
    served.require_ended(2, 120)


@kind(KINDS, "TMPDIR fills up while it serves", "requests go on, the server answers, SIGTERM ends it with status 0")
def _fills(place: Place) -> None:
    served = place.serve(wrapper=_tmpfs(_tmpdir(place), "64m"))
    load = place.load(served)
    _fill(_inside(served, served.traces.folder))
    load.require_finished()
    require_answers(served)


@kind(KINDS, "/dev/shm of 16 MiB", REFUSES)
def _small_shm(place: Place) -> None:
    served = place.start(wrapper=_tmpfs(Path("/dev/shm"), "16m"))
    last = served.require_ended(2, 120)
    require("/dev/shm" in last, f"the line does not name /dev/shm: {last}")


@kind(
    KINDS,
    "/dev/shm fills up while it serves",
    "requests end; the server answers once there is space, or ends with one line",
)
def _shm_fills(place: Place) -> None:
    served = place.serve(wrapper=_tmpfs(Path("/dev/shm"), "768m"))
    filler = _fill(_inside(served, Path("/dev/shm")))
    load = place.load(served, images=True)
    load.ends()
    filler.unlink()
    if served.process.poll() is None:
        require_answers(served, "once there is space again")
    else:
        served.require_ended(2)


@kind(KINDS, "no folder for temporary files", REFUSES)
def _no_tmp(place: Place) -> None:
    steps = [
        f"for folder in {folder}; do mount --bind $folder $folder; mount -o remount,ro,bind $folder; done"
        for folder in ("/tmp /var/tmp",)
    ]
    served = place.start(wrapper=namespace(*steps), cwd="/proc")
    served.require_ended(2, 120)


@kind(KINDS, "TMPDIR does not exist", "the server answers, or ends with one line")
def _absent_tmp(place: Place) -> None:
    _answers_or_refuses(place.start(environment={"TMPDIR": str(place.folder / "absent")}))


def _named_tmp(what: str, name: str) -> Kind:
    def check(place: Place) -> None:
        _answers_or_refuses(place.start(tmpdir=place.folder / name))

    return Kind(f"TMPDIR with {what}", "the server answers, or ends with one line; nothing is left", check)


KINDS += [
    _named_tmp("letters that are not ASCII", "größe-目录-🙂"),
    _named_tmp("a space", "with space"),
    _named_tmp("what a shell reads", "a'b;$HOME\"&"),
    _named_tmp("200 letters", "x" * 200),
]


@kind(KINDS, "HOME does not exist and cannot be made", "the server answers")
def _no_home(place: Place) -> None:
    require_answers(place.serve(environment={"HOME": "/proc/absent", "XDG_CACHE_HOME": "/proc/absent/cache"}))


@kind(KINDS, "no file longer than 256 KiB may be written", "the server answers, or ends with one line")
def _short_files(place: Place) -> None:
    _answers_or_refuses(place.start(preexec_fn=limited(resource.RLIMIT_FSIZE, 256 << 10)))


@kind(KINDS, "a build onto a disk that is too small", "status 2, one line, nothing is left")
def _build_small(place: Place) -> None:
    status, last, left = _build_on(place, "2m")
    require(status == 2 and "has too little space" in last, f"status {status}: {last}")
    require(not left, f"left behind: {left}")


@kind(KINDS, "a build whose disk fills up", "status 2, one line, nothing is left")
def _build_full(place: Place) -> None:
    # once the build has found that the space suffices, and has begun to write
    filling = "(until ls .*.unfinished/engine/*.data; do sleep 0.01; done; cat /dev/zero >filler) >/dev/null 2>&1 &"
    status, last, left = _build_on(place, "40m", filling)
    require(status == 2 and last.startswith("error: disk full"), f"status {status}: {last}")
    require(left == ["filler"], f"left behind: {left}")


def _build_on(place: Place, size: str, filling: str = ":;") -> tuple[int, str, list[str]]:
    """Builds on a file system of its own, in which the shell commands `filling` run before.

    Returns the exit status, the last line of stderr, and the names that are left."""
    target, listing = place.folder / "small", place.folder / "listing"
    target.mkdir()
    small = shlex.quote(str(target))
    inner = (
        f'mount -t tmpfs -o size={size} none {small}; here=$PWD; cd {small}; {filling} cd "$here"; '
        f'status=0; "$@" || status=$?; ls -A {small} >{shlex.quote(str(listing))}; exit $status'
    )
    status, last = end_of(place.build(target / "engine", wrapper=[*namespace()[:-3], "-c", inner, "sh"]))
    return status, last, listing.read_text().split()


@kind(KINDS, "a build whose files may not exceed 1 MiB", "status 2, one line, nothing is left")
def _build_short(place: Place) -> None:
    parent = place.folder / "engines"
    status, last = end_of(place.build(parent / "engine", preexec_fn=limited(resource.RLIMIT_FSIZE, 1 << 20)))
    require(status == 2 and last.startswith("error: "), f"status {status}: {last}")
    left = list(parent.iterdir()) if parent.exists() else []
    require(not left, f"left behind: {left}")


@kind(KINDS, "a build into a folder that cannot be written", "status 2, one line")
def _build_read_only(place: Place) -> None:
    status, last = end_of(place.build(Path("/proc/engines/engine")))
    require(status == 2 and last.startswith("error: "), f"status {status}: {last}")


def _answers_or_refuses(served: Served) -> None:
    """Checks that a server answers, or has ended with one line."""
    if served.is_ready_or_ended():
        require_answers(served)
    else:
        served.require_ended(2)


def _tmpdir(place: Place) -> Path:
    return place.folder / "server-0" / "tmp"


def _tmpfs(target: Path, size: str) -> list[str]:
    """Returns a wrapper with a small file system at `target`, made before if it is absent."""
    quoted = shlex.quote(str(target))
    return list(namespace(f"mkdir -p {quoted}", f"mount -t tmpfs -o size={size} none {quoted}"))


def _inside(served: Served, path: Path) -> Path:
    """Returns the path of a folder in the file systems of a server."""
    return Path(f"/proc/{served.process.pid}/root{path}")


def _fill(folder: Path) -> Path:
    """Writes until there is no space."""
    filler = folder / "filler"
    status = os.statvfs(folder)
    with filler.open("wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize))
    return filler
