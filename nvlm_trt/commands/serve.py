"""Implements `nvlm-trt serve`: Triton, and OpenAI's endpoints beside it, over an engine."""

from __future__ import annotations

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
from nvlm_trt.commands.shared_options import EngineArgument
from nvlm_trt.errors import NvlmError


def serve(
    engine: EngineArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8002,
    max_decode_seconds: DecodeSecondsOption = None,
    max_decode_memory: DecodeMemoryOption = None,
    no_prompt_reuse: Annotated[
        bool, typer.Option("--no-prompt-reuse", help="Take nothing over from earlier prompts.")
    ] = False,
    openai_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve OpenAI's endpoints too; 0 picks a free port [off].")
    ] = None,
    served_model_name: ServedNameOption = None,
    api_key: ApiKeyOption = None,
    api_key_file: ApiKeyFileOption = None,
    no_auth: NoAuthOption = False,
    allowed_media_domain: MediaDomainOption = None,
    cors_origin: CorsOriginOption = None,
    max_body_mib: MaxBodyOption = 64,
    no_ui: NoUiOption = False,
) -> None:
    """Serve an engine through Triton until SIGINT or SIGTERM; running requests are finished first.

    A request has at most 16 images of 32 MiB each and 32 MiB of text; larger ones are refused. The options from
    --served-model-name on are for the OpenAI endpoint; --host is where that listens, too.

    Example: nvlm-trt serve engines/nvlm-h --grpc-port 8001
    """
    from nvlm_trt.serving.foreground import run_in_foreground
    from nvlm_trt.serving.triton.repository import RepositoryOptions
    from nvlm_trt.serving.triton.server import ServerOptions

    limits = image_limits(max_decode_seconds, max_decode_memory)
    repository = RepositoryOptions(image_limits=limits, reuse_prompts=not no_prompt_reuse)
    options = ServerOptions(host, grpc_port, http_port, metrics_port, repository)
    if openai_port is None:
        of_openai = (served_model_name, api_key, api_key_file, no_auth, allowed_media_domain, cors_origin, no_ui)
        if any(of_openai):
            raise NvlmError("an option of the OpenAI endpoint has no effect without one; pass --openai-port 8080 too")
        raise typer.Exit(run_in_foreground(engine, options))
    of_gateway = gateway_options(
        host,
        openai_port,
        served_model_name,
        api_key,
        api_key_file,
        allowed_media_domain,
        cors_origin,
        max_body_mib,
        no_ui,
        limits,
    )
    from nvlm_trt.serving.gateway.server import GatewayServer

    with GatewayServer(of_gateway, no_auth) as openai:
        openai.start()
        raise typer.Exit(run_in_foreground(engine, options, openai))
