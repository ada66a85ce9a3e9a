"""Implements the command `nvlm-trt`. Prints an error in one line and exits with 2; --debug shows the traceback."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nvlm_trt import standard_streams, terminal
from nvlm_trt.bounds import MAX_SEED, MAX_TOKENS
from nvlm_trt.commands.bench import bench
from nvlm_trt.commands.build import build
from nvlm_trt.commands.constraint_options import ChoiceOption, JsonSchemaOption, RegexOption, constraint_of
from nvlm_trt.commands.decode_budget import DecodeMemoryOption, DecodeSecondsOption, image_limits
from nvlm_trt.commands.deploy import deploy
from nvlm_trt.commands.doctor import doctor
from nvlm_trt.commands.evaluate import evaluate
from nvlm_trt.commands.gateway import gateway
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
from nvlm_trt.commands.inspect_checkpoint import inspect
from nvlm_trt.commands.plan import plan
from nvlm_trt.commands.tiles import tiles
from nvlm_trt.commands.tinydocs import tinydocs
from nvlm_trt.errors import NvlmError
from nvlm_trt.extras import require
from nvlm_trt.model.preset_names import PRESET_NAMES
from nvlm_trt.standard_streams import OutputError
from nvlm_trt.termination import tidy_on_termination

_SIGPIPE_STATUS = 141  # as of a program that SIGPIPE ends
# typer uses click or its own copy of click
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="nvlm-trt",
    help="Build, verify, serve and ask NVLM-1.0 engines (NVLM-D, NVLM-X, NVLM-H).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EngineArgument = Annotated[Path, typer.Argument(help="Engine directory that `nvlm-trt build` made.")]
CheckpointOption = Annotated[Path, typer.Option(help="Checkpoint directory in HF layout.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing directory of that name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=4096, help="CPU threads per engine; default: all usable cores.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nvlm-trt {importlib.metadata.version('nvlm-trt')}")
        raise typer.Exit


@app.callback()
def main_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["NVLM_TRT_DEBUG"] = "1"


@app.command("init-checkpoint")
def init_checkpoint(
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESET_NAMES)}.")],
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the random weights.")] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a valid checkpoint with random weights, config and tokenizer.

    Example: nvlm-trt init-checkpoint --preset nvlm-h-tiny --seed 0 checkpoints/nvlm-h
    """
    require("build", "writing a checkpoint")
    from nvlm_trt.checkpoint.random_checkpoint import init_checkpoint as write

    with terminal.progress() as progress:
        write(directory, preset, seed=seed, overwrite=overwrite, progress=progress)
    terminal.note(f"wrote {directory} (random weights of {preset}, seed {seed})")


app.command()(inspect)
app.command()(build)
app.command()(plan)


@app.command()
def verify(
    engine: EngineArgument,
    checkpoint: CheckpointOption,
    lora: Annotated[Path | None, typer.Option(help="The adapter that the engine was built with.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Greedy tokens to compare.")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e6,
            help="Largest absolute difference allowed; default: 0.001, and a share of the largest value for image "
            "tokens in bf16.",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to compare on; default: one drawn for the purpose.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1e6,
            help="GB that an engine on the CPU may take; one that needs more runs a layer at a time [what is free].",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every stage of an engine with the PyTorch reference (needs the extra `reference`).

    The reference is read a layer at a time. A comparison that was killed goes on where it was.

    Example: nvlm-trt verify engines/nvlm-h --checkpoint checkpoints/nvlm-h
    """
    from nvlm_trt.evaluation.parity import verify_engine

    with terminal.progress() as progress:
        bound = None if memory is None else memory * 1e9
        report = verify_engine(engine, checkpoint, image, tokens, tolerance, progress, lora, bound)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        terminal.parity_table(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
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


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question; <image> marks the place of an image.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image to ask about; repeat for several.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="Refused: NVLM-1.0 was not trained on video.")] = None,
    engine: Annotated[Path | None, typer.Option(help="Engine directory, run in this process.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server, grpc://host:port.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens of at least this share of the highest probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Above 0 discourages tokens that the answer has.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that the answer has them.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Add to a token's logit; -100 bans it. Repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeat for several.")] = None,
    min_tokens: Annotated[int, typer.Option(help="Least tokens to generate.")] = 0,
    priority: Annotated[int, typer.Option(help="A server reads prompts of lower numbers first.")] = 0,
    draft_tokens: Annotated[int, typer.Option(help="Most tokens to draft and check in one step.")] = 0,
    n: Annotated[int, typer.Option("--n", help="Answers to the one question.")] = 1,
    logprobs: Annotated[int, typer.Option(help="Report log-probabilities with this many alternatives.")] = 0,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    choice: ChoiceOption = None,
    max_tiles: Annotated[int | None, typer.Option(help="Tiles per image, thumbnail not counted.")] = None,
    max_decode_seconds: DecodeSecondsOption = None,
    max_decode_memory: DecodeMemoryOption = None,
    threads: ThreadsOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Report tiles, time to first token and tokens/s.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask about images and stream the answer.

    Example: nvlm-trt ask "What is the total?" --image docs/images/receipt.png --engine engines/nvlm-h --stats
    """
    if video:
        raise NvlmError(
            f"--video {video[0]}: NVLM-1.0 was trained on still images, never on the frames of a video, so its answers "
            "about them would mean nothing; pass single pictures as --image"
        )
    if (engine is None) == (url is None):
        raise NvlmError("name either an engine or a server: pass one of --engine DIR and --url grpc://host:port")
    from nvlm_trt.answer_printing import print_answers
    from nvlm_trt.api import Message, SamplingParams
    from nvlm_trt.image.image_file import naming_files, read_image_file

    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_biases(logit_bias or []),
        seed=seed,
        stop=tuple(stop or ()),
        min_tokens=min_tokens,
        priority=priority,
        draft_tokens=draft_tokens,
        n=n,
        logprobs=logprobs,
        constraint=constraint_of(json_schema, regex, choice),
    )
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", question))
    paths = image or []
    images = tuple(read_image_file(path) for path in paths)
    if engine is not None:
        from nvlm_trt.api import ChatRequest
        from nvlm_trt.backends.opening import runtimes_here
        from nvlm_trt.engine import Engine
        from nvlm_trt.image.fork_server import FORK_SERVER
        from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

        if images:
            FORK_SERVER.start()  # while the engine is loaded
        options = RuntimeOptions(image_limits=image_limits(max_decode_seconds, max_decode_memory))
        with naming_files(paths), Pipeline.open(engine, threads=threads, options=options) as pipeline:
            stream = pipeline.generate(ChatRequest(messages, images, sampling, max_tiles))
            print_answers(stream, n, stats=stats, as_json=as_json)
        if stats and not as_json:
            runtimes = runtimes_here(Engine.open(engine))
            terminal.note(f"[{' | '.join(f'{stage}: {runtime}' for stage, runtime in runtimes.items())}]")
    else:
        from nvlm_trt.serving.client import Client

        with naming_files(paths), Client(str(url)) as client:
            stream = client.stream(messages=messages, images=images, sampling=sampling, max_tiles=max_tiles)
            print_answers(stream, n, stats=stats, as_json=as_json)


def _biases(options: list[str]) -> dict[int, float]:
    """Read options ID=BIAS. Raises NvlmError for one that is not."""
    biases: dict[int, float] = {}
    for option in options:
        token_id, _, bias = option.partition("=")
        try:
            number, value = int(token_id), float(bias)
        except ValueError:
            raise NvlmError(f"--logit-bias {option!r} is not ID=BIAS; write 198=-100 for example") from None
        if number in biases:
            raise NvlmError(f"--logit-bias names the token id {number} twice; name it once")
        biases[number] = value
    return biases


app.command()(deploy)
app.command()(doctor)
app.command()(gateway)
app.command()(tiles)
app.command("eval")(evaluate)
app.command()(tinydocs)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run a command and print its error in one line."""
    standard_streams.prepare()
    try:
        status = _run()
        sys.stdout.flush()
    except OutputError as error:
        if error.is_pipe:
            status = _SIGPIPE_STATUS
        else:
            _print_error(str(error))
            status = 2
    sys.exit(status)


def _run() -> int:
    try:
        with tidy_on_termination():
            return int(app(standalone_mode=False) or 0)
    except _ClickException as error:
        _show_usage_error(error)
        return error.exit_code
    except typer.Abort:
        _print_error("aborted")
        return 1
    except OutputError:
        raise
    except NvlmError as error:
        if _debugging():
            raise
        _print_error(str(error))
        return 2
    except MemoryError as error:
        if _debugging():
            raise
        _print_error(f"out of memory ({error}); `nvlm-trt plan` shows what an engine needs, smaller limits need less")
        return 2
    except Exception as error:
        if _debugging():
            raise
        detail = " ".join(str(error).split()) or "no message"
        _print_error(f"internal: {type(error).__name__}: {detail}; `nvlm-trt --debug ...` shows the traceback")
        return 1


def _show_usage_error(error: Any) -> None:
    """Print a wrong option in one line; without any argument, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "nvlm-trt"
    message = " ".join(error.format_message().split()).rstrip(".")
    _print_error(f"{message[:1].lower()}{message[1:]}; see `{command} --help`")


def _print_error(message: str) -> None:
    with contextlib.suppress(OSError):  # standard error cannot be written either
        terminal.error(message)


def _debugging() -> bool:
    return os.environ.get("NVLM_TRT_DEBUG") == "1"


if __name__ == "__main__":
    main()
