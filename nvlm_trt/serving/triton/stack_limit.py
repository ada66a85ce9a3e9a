"""Gives the threads of tritonserver stacks that hold large HTTP requests."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

# tritonserver 2.51 copies the JSON of an HTTP request to the stack of a thread, twice: with the usual 8 MiB, a request
# of 4 MiB ends the server. A stack takes memory only as far as it is used.
STACK_BYTES = 1 << 30


@contextlib.contextmanager
def large_stacks() -> Iterator[None]:
    """Give processes that are started meanwhile threads with stacks of STACK_BYTES, or what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    most = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    # set even if there is no limit: glibc then makes stacks of 2 MiB
    resource.setrlimit(resource.RLIMIT_STACK, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
