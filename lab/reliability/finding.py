"""Keeps each fault as a file from which it can be brought about again."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nvlm_trt.errors import NvlmError

FILES, REQUESTS = "files", "requests"
_MOST_BYTES = 4 << 20  # of an input that is kept beside its seed and number


@dataclass(frozen=True)
class Finding:
    """Says which input of which seed led to a fault, and holds the input for those without the generator."""

    part: str  # FILES or REQUESTS
    seed: int
    number: int
    made: str
    fault: str
    data: str = ""  # base64

    @classmethod
    def of(cls, part: str, seed: int, number: int, made: str, fault: str, data: bytes) -> Finding:
        return cls(part, seed, number, made, fault, base64.b64encode(data[:_MOST_BYTES]).decode())

    @classmethod
    def read(cls, path: Path) -> Finding:
        """Raises NvlmError for a file that is not a finding."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise NvlmError(f"{path} is not a finding ({error}); name a file of WORK/findings") from None

    @property
    def line(self) -> str:
        return f"{self.part} {self.number} of seed {self.seed} ({self.made}): {self.fault}"

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.part}-{self.seed}-{self.number}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path
