"""Holds what all requests of a gateway share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.serving.gateway.auth import ApiKeys
from nvlm_trt.serving.gateway.errors import model_not_found, not_ready
from nvlm_trt.serving.gateway.media import MediaReader
from nvlm_trt.serving.gateway.metrics import GatewayMetrics
from nvlm_trt.serving.gateway.reading import BodyReader
from nvlm_trt.serving.gateway.source import ChatSource, ServedModel


@dataclass(frozen=True)
class GatewayOptions:
    """Settings of a gateway."""

    host: str = "127.0.0.1"
    port: int = 0  # 0 stands for a free port
    keys: ApiKeys = field(default_factory=lambda: ApiKeys([]))
    served_model_names: Sequence[str] = ()  # none: the engine's name
    allowed_media_domains: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    has_page: bool = True  # at /
    max_body_bytes: int = 64 << 20
    body_seconds: float = 60  # for the whole body of a request
    media_seconds: float = 10  # for an image of a URL
    send_seconds: float = 60  # for a client to take an event of a stream
    drain_seconds: float = 30  # for open requests when the gateway is stopped
    image_limits: ImageLimits = field(default_factory=ImageLimits)


class Gateway:
    """Knows the source once there is one, and whether the gateway is stopping. Lives in one event loop."""

    def __init__(self, options: GatewayOptions) -> None:
        self.options = options
        self.bodies = BodyReader(options.max_body_bytes, options.body_seconds)
        self.media = MediaReader(options.image_limits, options.allowed_media_domains, options.media_seconds)
        self.metrics = GatewayMetrics(lambda: self.open_requests)
        self.source: ChatSource | None = None  # None until it has answered the canary
        self.draining = False
        self.open_requests = 0

    def serving(self) -> ChatSource:
        """Return the source. Raises HttpError while there is none, and once the gateway drains."""
        if self.source is None or self.draining:
            raise not_ready()
        return self.source

    async def ready(self) -> bool:
        return self.source is not None and not self.draining and await self.source.ready()

    def names(self, model: ServedModel) -> Sequence[str]:
        """Return the names that requests may give the model."""
        return self.options.served_model_names or (model.name,)

    def check_name(self, name: str, model: ServedModel) -> None:
        """Raise HttpError for a model that is not served."""
        names = self.names(model)
        if name not in names:
            raise model_not_found(name, ", ".join(names))

    async def close(self) -> None:
        self.media.close()
        if self.source is not None:
            await asyncio.shield(self.source.close())
