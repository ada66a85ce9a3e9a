"""Keeps a server for the fuzz and the soak: starts it, names its processes, and says what its cache holds."""

from __future__ import annotations

import re
import shutil
import urllib.request
from pathlib import Path

from lab.reliability.memory import MEBIBYTE
from lab.reliability.served import Served, running
from lab.reliability.wire import Wire

CHAT_MODEL = "nvlm_0_0"
_SECONDS = 10


class ServedTarget:
    """Runs the real command. A context manager."""

    def __init__(self, engine: Path, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        self._served: Served | None = None

    def __enter__(self) -> ServedTarget:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> ServedTarget:
        """Starts a server; ends the earlier one first."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._served = running(self._engine, self._folder)
        return self

    @property
    def served(self) -> Served:
        assert self._served is not None, "the server is running"
        return self._served

    def wire(self) -> Wire:
        return Wire(self.served.address, self.served.http_address)

    def is_alive(self) -> bool:
        return self.served.process.poll() is None

    def roles(self) -> dict[str, int]:
        return self.served.roles()

    def kept(self) -> dict[str, float]:
        """Returns the MiB that the image cache holds on purpose, up to its limit."""
        return {CHAT_MODEL: metric(self.served.metrics_address, "nvlm_image_cache_bytes") / MEBIBYTE}

    def close(self) -> None:
        if self._served is not None:
            self._served.close()
            self._served = None


def metric(address: str, name: str) -> float:
    """Reads a metric, summed over its labels; 0 if the server does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=_SECONDS) as response:
            text = response.read().decode()
    except OSError:
        return 0.0
    return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
