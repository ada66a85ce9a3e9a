"""The server that is measured: what it says of itself, and the tokenizer that its prompts are counted with."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError, RequestError, ServerError
from nvlm_trt.tokenizer import TOKENIZER_JSON, Tokenizer

_LOOPBACK = ("grpc://127.", "grpc://localhost:", "grpc://[::1]:")
_DEFAULT_GRPC_PORT, _DEFAULT_METRICS_PORT = 8001, 8002


@dataclass(frozen=True)
class Target:
    url: str
    triton: str  # version
    engine: str  # directory, on the server's machine
    # of an engine on this machine only
    model: str | None = None
    digest: str | None = None
    precision: dict[str, str] | None = None
    limits: dict[str, int] | None = None

    @classmethod
    def connect(cls, url: str) -> Target:
        """Raises ServerError if there is no server at `url` or it serves something else."""
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        from nvlm_trt.serving.client import Client
        from nvlm_trt.serving.wire import MODEL

        with Client(url) as client:
            if not client.ready():
                raise no_server(url)
        local = url.startswith(_LOOPBACK)
        options = [("grpc.enable_http_proxy", 0)] if local else []  # as Client: not for this machine's servers
        try:
            with InferenceServerClient(url.removeprefix("grpc://").rstrip("/"), channel_args=options) as triton:
                version = str(triton.get_server_metadata(as_json=True)["version"])
                config = triton.get_model_config(MODEL, as_json=True)["config"]
            path = str(config["parameters"]["engine"]["string_value"])
        except (InferenceServerException, KeyError) as error:
            detail = " ".join(str(error).split())
            raise ServerError(f"{url} does not serve an nvlm-trt engine ({detail}); name a server of ours") from None
        if local:
            with contextlib.suppress(NvlmError):
                engine = Engine.open(path)
                limits = engine.limits.model_dump()
                return cls(url, version, path, engine.config.name, engine.digest, engine.manifest.precision, limits)
        return cls(url, version, path)

    def tokenizer(self, directory: Path | None) -> Tokenizer:
        """That of `directory`, by default the engine's. Raises NvlmError if there is none."""
        if directory is not None:
            return Tokenizer.from_directory(directory)
        if not Path(self.engine, TOKENIZER_JSON).is_file():
            raise RequestError(
                f"{self.engine}, which {self.url} serves, is not on this machine; pass --tokenizer DIR, an engine or a "
                f"checkpoint with the same {TOKENIZER_JSON}"
            )
        return Tokenizer.from_directory(self.engine)

    @property
    def default_metrics_url(self) -> str | None:
        """Where `nvlm-trt serve` reports with its default ports. None with others: the port is not known."""
        host, _, port = self.url.removeprefix("grpc://").rstrip("/").rpartition(":")
        return f"http://{host}:{_DEFAULT_METRICS_PORT}/metrics" if port == str(_DEFAULT_GRPC_PORT) else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def no_server(url: str) -> ServerError:
    return ServerError(f"no server answers at {url}; start one with `nvlm-trt serve`, or check host and port")
