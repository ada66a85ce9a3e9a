"""Compares whole paths: one new image of 6 + 1 tiles and a question, answered by the product and by other software.

    lab/peers/install.sh WORK/peers
    python -m lab.whole_path --work WORK --rounds 5

All contenders have the same random weights, decode and tile the same JPEG (6 tiles and a thumbnail of 448 pixels, 256
image tokens each), read the same text and generate greedily; each runs in a process of its own. TTFT is the time from
the request to the first token; tokens/s are those of the tokens after the first. transformers runs its InternVL in bf16
in each of its modes; llama.cpp and OpenVINO GenAI run in an environment of their own and are skipped without it. The
plot lies beside the JSON file and has the best of transformers' modes.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lab.bars import Panel, draw
from lab.common import parser, result_path, run
from lab.engines import random_checkpoint, random_engine
from lab.images import ImageSize, new_image
from lab.peers.client import Worker, exported_language_model, open_workers, peers_python
from lab.rounds import Contender, Rounds
from lab.transformers_model import write_vision_encoder
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import NvlmError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.tokenizer import Tokenizer

RESULT = "whole_path.json"
PICTURE = "whole_path.png"
SIZE = ImageSize(1344, 896)  # three by two tiles
OURS, TRANSFORMERS = "nvlm-trt", "transformers bf16"
MODES = ("eager/dynamic", "eager/static", "sdpa/dynamic", "sdpa/static")
GGUF_TYPES = ("BF16", "Q8_0")
OPENVINO_WEIGHTS = {"bf16": "float", "int8 weights": "int8"}
FORMAT_TOKENS = 128  # at most: those of the chat format and of image tags, which differ between the prompt formats
COMPARED = 2  # tokens of each answer

Question = dict[str, Any]
Ask = Callable[[Question], dict[str, Any]]


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precisions", nargs="+", default=["bf16", "int8,vision_encoder=int8"], help="of the product")
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of transformers")
    made.add_argument("--text-tokens", nargs="+", type=int, default=[64, 512])
    made.add_argument("--answer-tokens", type=int, default=32)
    made.add_argument("--without", nargs="+", default=[], metavar="NAME", help="contenders, where memory is short")
    made.add_argument("--peers", type=Path, help="python of the peers' environment [WORK/peers/bin/python]")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    checkpoint = random_checkpoint(arguments.work, arguments.preset)
    questions = questions_of(checkpoint, arguments.text_tokens)
    with Checkpoint.open(checkpoint) as source:
        config = source.config
    answers: dict[str, dict[int, dict[str, Any]]] = {}
    with contextlib.ExitStack() as opened:
        peers, notes = open_workers(workers_of(arguments, checkpoint), opened)
        asks: dict[str, Ask] = {}
        for name, peer in peers.items():
            modes = {f" {mode}": {"mode": mode} for mode in arguments.modes} if name == TRANSFORMERS else {"": {}}
            asks |= {f"{name}{mode}": partial(ask_with, peer.ask, keys) for mode, keys in modes.items()}
        contenders = {
            name: contender(ask, questions, arguments.answer_tokens, config, answers.setdefault(name, {}))
            for name, ask in asks.items()
        }
        # the origin has the versions of this environment
        versions = {name: peer.version for name, peer in peers.items() if not name.startswith((OURS, TRANSFORMERS))}
        rounds.add_versions(versions)
        rounds.run(contenders, arguments.rounds)
    report(arguments, rounds, answers, notes, versions)


def questions_of(checkpoint: Path, lengths: list[int]) -> dict[int, str]:
    prompts = PromptWriter(Tokenizer.from_directory(checkpoint))
    return {tokens: prompts.write(tokens, np.random.default_rng(0)) for tokens in lengths}


def workers_of(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, Worker]:
    """Builds the product's engines, and returns how to start every process."""
    work, threads, here, theirs = arguments.work, arguments.threads, Path(sys.executable), peers_python(arguments)
    workers = {}
    for precision in arguments.precisions:
        engine = random_engine(work, arguments.preset, precision)
        workers[f"{OURS} {precision}"] = Worker(here, "lab.peers.nvlm_worker", [engine.path, threads])
    workers[TRANSFORMERS] = Worker(here, "lab.peers.transformers_worker", [checkpoint, "bf16", threads])
    exported = vision = checkpoint
    if theirs.exists():
        exported = exported_language_model(work, checkpoint)
        vision = work / "hf" / f"{checkpoint.name} vision encoder.pt"
        if not vision.exists():
            write_vision_encoder(checkpoint, vision)
    for name, weights in OPENVINO_WEIGHTS.items():
        folder = work / "hf" / f"{checkpoint.name} OpenVINO GenAI"
        of_all = [exported, checkpoint, vision, folder, weights, threads]
        workers[f"OpenVINO GenAI {name}"] = Worker(theirs, "lab.peers.genai_worker", of_all)
    for kind in GGUF_TYPES:
        folder = work / "hf" / f"{checkpoint.name} llama.cpp mtmd {kind}"
        workers[f"llama.cpp {kind}"] = Worker(
            theirs, "lab.peers.mtmd_worker", [exported, checkpoint, folder, kind, threads]
        )
    unknown = sorted(set(arguments.without) - set(workers))
    if unknown:
        raise NvlmError(f"--without {unknown[0]!r} is not one of {', '.join(workers)}; name one of them")
    return {name: worker for name, worker in workers.items() if name not in arguments.without}


def ask_with(ask: Ask, keys: Mapping[str, str], question: Question) -> dict[str, Any]:
    return ask({**question, **keys})


def contender(
    ask: Ask, questions: Mapping[int, str], tokens: int, config: NvlmConfig, answers: dict[int, dict[str, Any]]
) -> Contender:
    """Asks every question once about a new image, and keeps the last answer to each in `answers`."""

    def measure() -> Mapping[str, float]:
        measured = {}
        for text_tokens, question in questions.items():
            image = base64.b64encode(new_image(SIZE)).decode()
            answer = ask({"image": image, "question": question, "tokens": tokens})
            check_work(answer, text_tokens, tokens, config)
            answers[text_tokens] = answer
            decoding = answer["total_s"] - answer["first_s"]
            measured[ttft_of(text_tokens)] = answer["first_s"]
            measured[speed_of(text_tokens)] = (tokens - 1) / decoding
            for part, seconds in answer["parts"].items():
                measured[f"{part.replace('_', ' ')} s, {text_tokens} text tokens"] = seconds
        return measured

    return measure


def check_work(answer: Mapping[str, Any], text_tokens: int, tokens: int, config: NvlmConfig) -> None:
    """Asserts that the contender has read what all read: every tile's image tokens, and the whole text."""
    expected = config.tiles_per_image * config.tokens_per_tile
    assert answer["image_tokens"] == expected, f"{answer['image_tokens']} image tokens, not {expected}"
    others = answer["prompt_tokens"] - expected - text_tokens
    assert 0 < others <= FORMAT_TOKENS, f"{answer['prompt_tokens']} tokens in the prompt"
    assert len(answer["tokens"]) == tokens, f"{len(answer['tokens'])} tokens in the answer"


def ttft_of(text_tokens: int) -> str:
    return f"TTFT s, {text_tokens} text tokens"


def speed_of(text_tokens: int) -> str:
    return f"tokens/s, {text_tokens} text tokens"


def report(
    arguments: argparse.Namespace,
    rounds: Rounds,
    answers: Mapping[str, Mapping[int, Mapping[str, Any]]],
    notes: list[str],
    versions: Mapping[str, str],
) -> None:
    ratios, panels = [], []
    for text_tokens in arguments.text_tokens:
        for metric, largest in ((ttft_of(text_tokens), False), (speed_of(text_tokens), True)):
            best = rounds.best(metric, TRANSFORMERS, largest)
            others = [name for name in rounds.values if not name.startswith((OURS, TRANSFORMERS))]
            baselines = [name for name in (best, *others) if name]
            ours = [name for name in rounds.values if name.startswith(OURS)]
            ratios += [(metric, name, baseline) for name in ours for baseline in baselines]
            panels.append(Panel(metric, {name: rounds.spread(name, metric) for name in (*ours, *baselines)}))
    read = {
        name: {text_tokens: {key: answer[key] for key in ("prompt_tokens", "image_tokens")}
               for text_tokens, answer in of_name.items()}
        for name, of_name in answers.items() if of_name
    }  # fmt: skip
    first_tokens = {
        name: {text_tokens: answer["tokens"][:COMPARED] for text_tokens, answer in of_name.items()}
        for name, of_name in answers.items()
        if of_name
    }
    others_found = {"read": read, "first_tokens": first_tokens} if read else {}
    rounds.report(ratios, skipped=notes, image=str(SIZE), notes=notes, peers=versions, **others_found)
    picture = result_path(arguments, RESULT).with_name(PICTURE)
    draw(panels, picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    run(options(), measure, RESULT, picture=PICTURE)
