"""Makes the temporary folder of a server, and removes those of servers that were killed together with their guard."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from nvlm_trt.owned_folder import abandoned, make_owned_folder
from nvlm_trt.serving.triton.guard import remove_files
from nvlm_trt.temporary import temporary_folder

_NAME = "nvlm-trt-server-"


@dataclass(frozen=True)
class ServerFolder:
    """Holds the folder's lock. The names of the server's shared memory begin with `shm_prefix`."""

    path: Path
    shm_prefix: str
    _lock: int

    @classmethod
    def make(cls) -> ServerFolder:
        """Make the folder. Raises EngineError without a folder for temporary files, OSError if that one is full."""
        parent = temporary_folder()
        for left in abandoned(sorted(parent.glob(f"{_NAME}*"))):
            remove_files(left, shm_prefix_of(left))
        path = parent / f"{_NAME}{secrets.token_hex(4)}"
        return cls(path, shm_prefix_of(path), make_owned_folder(path))

    def remove(self) -> None:
        """Remove the folder and the shared memory. Call it once."""
        remove_files(self.path, self.shm_prefix)
        os.close(self._lock)


def shm_prefix_of(folder: Path) -> str:
    """Return what the names of a server's shared memory begin with."""
    return f"nvlm_trt_{folder.name.removeprefix(_NAME)}_"
