"""Defines the options of the OpenAI endpoint, which `serve` and `gateway` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_trt.extras import require

if TYPE_CHECKING:
    from nvlm_trt.image.image_limits import ImageLimits
    from nvlm_trt.serving.gateway.gateway import GatewayOptions

ServedNameOption = Annotated[
    list[str] | None, typer.Option(help="Name of the model in requests; repeat for several [the engine's].")
]
ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(help="API key; repeat for several. Other users of this machine see options: prefer a file."),
]
ApiKeyFileOption = Annotated[Path | None, typer.Option(help="File of API keys, one per line.")]
NoAuthOption = Annotated[bool, typer.Option("--no-auth", help="Let everyone ask who can reach --host.")]
MediaDomainOption = Annotated[
    list[str] | None, typer.Option(help="Host whose http(s) images are read; repeat for several [none].")
]
CorsOriginOption = Annotated[
    list[str] | None, typer.Option(help="Origin whose pages may ask, https://example.com; repeat for several [none].")
]
NoUiOption = Annotated[bool, typer.Option("--no-ui", help="Do not serve the page for trying the model at /.")]
MaxBodyOption = Annotated[int, typer.Option(min=1, max=2047, metavar="MIB", help="Largest body of a request.")]


def gateway_options(
    host: str,
    port: int,
    served_model_name: list[str] | None,
    api_key: list[str] | None,
    api_key_file: Path | None,
    allowed_media_domain: list[str] | None,
    cors_origin: list[str] | None,
    max_body_mib: int,
    no_ui: bool,
    image_limits: ImageLimits,
) -> GatewayOptions:
    """Make the settings of a gateway. Raises NvlmError for keys that cannot be read, and without the extra."""
    require("openai", "the OpenAI endpoint")
    from nvlm_trt.serving.gateway.auth import read_keys
    from nvlm_trt.serving.gateway.gateway import GatewayOptions

    return GatewayOptions(
        host=host,
        port=port,
        keys=read_keys(api_key or [], api_key_file),
        served_model_names=served_model_name or [],
        allowed_media_domains=allowed_media_domain or [],
        cors_origins=cors_origin or [],
        has_page=not no_ui,
        max_body_bytes=max_body_mib << 20,
        image_limits=image_limits,
    )
