"""Sets the limits that the kernel holds tritonserver and its models to."""

from __future__ import annotations

import resource

from nvlm_trt.errors import ServerError

_NEEDED_DESCRIPTORS = 256  # it takes 70 to start, each connection takes one


def limit_process(pid: int, file_bytes: int) -> None:
    """Limit a process that has just started, and those that it will start.

    Raises its limit of open files to the hard one: each connection takes one, and the usual soft limit is 1,024. Bounds
    each file that it writes: the python backend extends a region of shared memory, which is a file, for every larger
    tensor and never gives any back. A request that needs more is refused; its process must ignore SIGXFSZ."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    bound = file_bytes if hard == resource.RLIM_INFINITY else min(file_bytes, hard)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (bound, bound))


def check_descriptors() -> None:
    """Raise ServerError if a process may have too few files and connections open for tritonserver to start."""
    if most_descriptors() < _NEEDED_DESCRIPTORS:
        raise too_few_descriptors()


def most_descriptors() -> int:
    """Return how many files and connections a process may have open once `limit_process` has raised its limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def too_few_descriptors() -> ServerError:
    """The error of a server that has no descriptor left."""
    return ServerError(
        f"tritonserver may have {most_descriptors()} files and connections open, too few; raise the limit to 1024 or "
        "more (ulimit -Hn, docker run --ulimit nofile=65536)"
    )
