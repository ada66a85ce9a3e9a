"""Describes the server to measure, and finds the tokenizer that counts the tokens of its prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm_trt.errors import RequestError
from nvlm_trt.prompt.tokenizer import TOKENIZER_JSON, Tokenizer

_DEFAULT_GRPC_PORT, _DEFAULT_METRICS_PORT = 8001, 8002


@dataclass(frozen=True)
class Target:
    """Describes the server to measure and the engine that the server has loaded."""

    url: str
    triton: str  # version
    engine: str  # directory, on the server's machine
    # None if the server is of an earlier nvlm-trt, on another machine
    model: str | None = None
    digest: str | None = None
    precision: dict[str, str] | None = None
    limits: dict[str, int] | None = None
    replaced: bool = False  # the directory holds another engine by now
    here: bool = True  # the directory may be on this machine

    @classmethod
    def connect(cls, url: str) -> Target:
        """Asks the server at `url` what it serves.

        Raises ServerError if there is no server at `url` or it serves no engine of this product.
        """
        from nvlm_trt.serving.served_engine import find_served_engine

        served = find_served_engine(url)
        if (record := served.record) is None:
            return cls(url, served.triton, served.path)
        known = (record.model, record.digest, record.precision, record.limits)
        return cls(url, served.triton, served.path, *known, served.replaced, served.engine is not None)

    def tokenizer(self, directory: Path | None) -> Tokenizer:
        """Opens the tokenizer in `directory`, by default the engine's. Raises NvlmError if there is none."""
        if directory is not None:
            return Tokenizer.from_directory(directory)
        if self.replaced:
            raise RequestError(
                f"{self.engine} was replaced since {self.url} loaded it, so its tokenizer may be another; restart the "
                "server, or pass --tokenizer DIR"
            )
        if not (self.here and Path(self.engine, TOKENIZER_JSON).is_file()):
            raise RequestError(
                f"{self.engine}, which {self.url} serves, is not on this machine; pass --tokenizer DIR, an engine or a "
                f"checkpoint with the same {TOKENIZER_JSON}"
            )
        return Tokenizer.from_directory(self.engine)

    @property
    def default_metrics_url(self) -> str | None:
        """Returns the metrics address for the default ports of `nvlm-trt serve`. None: other ports, unknown address."""
        host, _, port = self.url.removeprefix("grpc://").rstrip("/").rpartition(":")
        return f"http://{host}:{_DEFAULT_METRICS_PORT}/metrics" if port == str(_DEFAULT_GRPC_PORT) else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
