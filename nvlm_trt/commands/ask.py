"""Implements `nvlm-trt ask`: a question about images, to an engine in this process or to a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.commands.constraint_options import ChoiceOption, JsonSchemaOption, RegexOption, constraint_of
from nvlm_trt.commands.decode_budget import DecodeMemoryOption, DecodeSecondsOption, image_limits
from nvlm_trt.commands.shared_options import JsonOption, ThreadsOption
from nvlm_trt.errors import NvlmError


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
    from nvlm_trt.api import ChatRequest, Message, SamplingParams
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
    if engine is None:
        from nvlm_trt.serving.client import Client

        with naming_files(paths), Client(str(url)) as client:
            stream = client.stream(messages=messages, images=images, sampling=sampling, max_tiles=max_tiles)
            print_answers(stream, n, stats=stats, as_json=as_json)
        return
    from nvlm_trt.backends.opening import runtimes_here
    from nvlm_trt.image.fork_server import FORK_SERVER
    from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

    if images:
        FORK_SERVER.start()  # while the engine is loaded
    options = RuntimeOptions(image_limits=image_limits(max_decode_seconds, max_decode_memory))
    with naming_files(paths), Pipeline.open(engine, threads=threads, options=options) as pipeline:
        stream = pipeline.generate(ChatRequest(messages, images, sampling, max_tiles))
        print_answers(stream, n, stats=stats, as_json=as_json)
        if stats and not as_json:
            runtimes = runtimes_here(pipeline.engine)
            terminal.note(f"[{' | '.join(f'{stage}: {runtime}' for stage, runtime in runtimes.items())}]")


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
