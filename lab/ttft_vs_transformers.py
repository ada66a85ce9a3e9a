"""Compares TTFT of one image and a question: the whole of NVLM-D, and transformers with the same weights.

    python -m lab.ttft_vs_transformers --work WORK

The image becomes 6 tiles and a thumbnail; the question has 64 tokens, plus format and tile tags. Our time is that
of a request to the Pipeline until its first token, with stages as the Pipeline counts them; every round's image is new
to the image cache. transformers runs its InternVL over our projector; our code decodes and tiles the image there too.
Both sides have to agree on the first token in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from lab.common import parser, run
from lab.engines import random_checkpoint, random_engine
from lab.images import ImageSize, new_image
from lab.rounds import Contender, Rounds
from lab.transformers_model import TORCH_DTYPES, whole_model
from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.base import BackendArray
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.engine import Engine
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import normalise_tiles, tile_image
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.pipeline import Pipeline

RESULT = "ttft.json"
TTFT = "TTFT ms"
SIZE = ImageSize(1344, 896)  # three by two tiles


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precisions", nargs="+", default=["fp32", "int8-weight-only", "int8,vision_encoder=int8"])
    made.add_argument("--dtypes", nargs="+", choices=TORCH_DTYPES, default=list(TORCH_DTYPES))
    made.add_argument("--attention", nargs="+", default=["eager", "sdpa"])
    made.add_argument("--text-tokens", type=int, default=64)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    torch.set_num_threads(arguments.threads)
    engines = {name: random_engine(arguments.work, arguments.preset, name) for name in arguments.precisions}
    checkpoint = random_checkpoint(arguments.work, arguments.preset)
    prompts = PromptWriter(Tokenizer.from_directory(checkpoint))
    question = prompts.write(arguments.text_tokens, np.random.default_rng(0))
    first_tokens: dict[str, int] = {}
    with contextlib.ExitStack() as opened:
        contenders: dict[str, Contender] = {}
        for precision, engine in engines.items():
            ours = opened.enter_context(Ours(engine, question, arguments.threads))
            contenders[f"nvlm-trt {precision}"] = ours.measure
            if precision == "fp32":
                first_tokens["nvlm-trt"] = ours.first_token()
        some_engine = next(iter(engines.values()))
        for dtype in arguments.dtypes:
            model = whole_model(checkpoint, TORCH_DTYPES[dtype])
            for attention in arguments.attention:
                theirs = Theirs(model, some_engine, question, attention)
                contenders[f"transformers {dtype} {attention}"] = theirs.measure
            if dtype == "fp32":
                first_tokens["transformers"] = theirs.first_token()
        assert len(set(first_tokens.values())) <= 1, f"the first token differs: {first_tokens}"
        rounds.run(contenders, arguments.rounds)
    baselines = [rounds.best(TTFT, f"transformers {dtype}", largest=False) for dtype in arguments.dtypes]
    ratios = [(TTFT, f"nvlm-trt {name}", baseline) for name in engines for baseline in baselines if baseline]
    rounds.report(ratios, image=str(SIZE), same_first_token=len(first_tokens) == 2)


class Ours:
    """Times a Pipeline, its image encoder in two parts. A context manager."""

    def __init__(self, engine: Engine, question: str, threads: int) -> None:
        self._backend = open_backend(engine, threads=threads)
        self._max_tiles = engine.limits.max_tiles
        tokenizer = Tokenizer.from_directory(engine.path)
        generator = Batcher(self._backend, tokenizer)
        self._pipeline = Pipeline(engine, generator, tokenizer, encode_tiles=self._encode_tiles)
        self._question = question
        self._vision_s = 0.0

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipeline.close()

    def measure(self) -> Mapping[str, float]:
        request = self._request()
        started = time.perf_counter()
        stream = self._pipeline.generate(request)
        next(stream)
        ttft = time.perf_counter() - started
        usage = list(stream)[-1].usage
        assert usage is not None
        assert usage.ttft_s is not None
        assert usage.image_tiles == self._max_tiles + 1, f"{usage.image_tiles} tiles"
        prefill = usage.ttft_s - usage.queue_s
        tiling = usage.encode_s - self._vision_s
        return {
            TTFT: 1e3 * ttft,
            "tiling ms": 1e3 * tiling,
            "vision encoder ms": 1e3 * self._vision_s,
            "prefill ms": 1e3 * prefill,
            "rest ms": 1e3 * (ttft - tiling - self._vision_s - prefill),
        }

    def first_token(self) -> int:
        return next(self._pipeline.generate(self._request())).token_ids[0]

    def _request(self) -> ChatRequest:
        sampling = SamplingParams(max_tokens=2, ignore_eos=True)
        return ChatRequest([Message("user", self._question)], [new_image(SIZE)], sampling)

    def _encode_tiles(self, tiles: npt.NDArray[np.uint8]) -> BackendArray:
        started = time.perf_counter()
        tokens = self._backend.encode(normalise_tiles(tiles))
        self._vision_s = time.perf_counter() - started
        return tokens


class Theirs:
    """Times transformers with one kind of attention. `engine` lends its prompt format."""

    def __init__(self, model: PreTrainedModel, engine: Engine, question: str, attention: str) -> None:
        self._model, self._question, self._attention = model, question, attention
        self._config, self._max_tiles = engine.config, engine.limits.max_tiles
        self._prompts = PromptEncoder(engine.config, Tokenizer.from_directory(engine.path))

    def measure(self) -> Mapping[str, float]:
        image = new_image(SIZE)
        self._model.set_attn_implementation(self._attention)
        started = time.perf_counter()
        self._answer(image)
        return {TTFT: 1e3 * (time.perf_counter() - started)}

    def first_token(self) -> int:
        return self._answer(new_image(SIZE))

    @torch.inference_mode()
    def _answer(self, image: bytes) -> int:
        tiles = tile_image(load_image(image), self._config.vision.image_size, self._max_tiles)
        prompt = self._prompts.encode([Message("user", self._question)], [len(tiles)])
        logits = self._model(
            input_ids=torch.from_numpy(prompt.input_ids)[None],
            pixel_values=torch.from_numpy(tiles).to(self._model.dtype),
            use_cache=True,
            logits_to_keep=1,
        ).logits[0, -1]
        logits[self._config.image_token_id] = -torch.inf  # the image placeholder is never sampled
        return int(logits.argmax())


if __name__ == "__main__":
    run(options(), measure, RESULT)
