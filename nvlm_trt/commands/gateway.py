"""Implements `nvlm-trt gateway`: OpenAI's endpoints over an engine or over a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvlm_trt.commands.decode_budget import DecodeMemoryOption, DecodeSecondsOption, image_limits
from nvlm_trt.commands.gateway_options import (
    ApiKeyFileOption,
    ApiKeyOption,
    CorsOriginOption,
    MaxBodyOption,
    MediaDomainOption,
    NoAuthOption,
    NoUiOption,
    ServedNameOption,
    gateway_options,
)
from nvlm_trt.errors import NvlmError


def gateway(
    url: Annotated[str | None, typer.Option(help="A running server, grpc://host:port.")] = None,
    engine: Annotated[Path | None, typer.Option(help="Engine directory, run in this process, without Triton.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8080,
    served_model_name: ServedNameOption = None,
    api_key: ApiKeyOption = None,
    api_key_file: ApiKeyFileOption = None,
    no_auth: NoAuthOption = False,
    allowed_media_domain: MediaDomainOption = None,
    cors_origin: CorsOriginOption = None,
    max_body_mib: MaxBodyOption = 64,
    no_ui: NoUiOption = False,
    max_decode_seconds: DecodeSecondsOption = None,
    max_decode_memory: DecodeMemoryOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="CPU threads of the engine; default: all usable cores.")
    ] = None,
) -> None:
    """Serve OpenAI's endpoints, images included, until SIGINT or SIGTERM; running requests are finished first.

    Example: nvlm-trt gateway --engine engines/nvlm-h --port 8080
    """
    if (engine is None) == (url is None):
        raise NvlmError("name either an engine or a server: pass one of --engine DIR and --url grpc://host:port")
    limits = image_limits(max_decode_seconds, max_decode_memory)
    options = gateway_options(
        host,
        port,
        served_model_name,
        api_key,
        api_key_file,
        allowed_media_domain,
        cors_origin,
        max_body_mib,
        no_ui,
        limits,
    )
    from nvlm_trt.serving.gateway.foreground import serve_engine, serve_url

    if engine is not None:
        serve_engine(engine, threads, options, no_auth)
    else:
        serve_url(str(url), options, no_auth)
