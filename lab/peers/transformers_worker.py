"""Runs the whole path in transformers: its InternVL over the product's projector. The client starts this worker:

    python -m lab.peers.transformers_worker CHECKPOINT DTYPE THREADS

Questions have one more key, "mode": attention/cache, such as "sdpa/static". The product decodes and tiles the image and
writes the prompt.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, StaticCache

from lab.peers.worker import Answer, Clock, serve
from lab.transformers_model import TORCH_DTYPES, whole_model
from nvlm_trt.api import Message
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer


def main() -> None:
    serve(lambda: load(Path(sys.argv[1]), TORCH_DTYPES[sys.argv[2]], threads=int(sys.argv[3])))


def load(checkpoint: Path, dtype: torch.dtype, threads: int) -> tuple[str, Answer]:
    torch.set_num_threads(threads)
    model = whole_model(checkpoint, dtype)
    with Checkpoint.open(checkpoint) as source:
        config = source.config
    prompts = PromptEncoder(config, Tokenizer.from_directory(checkpoint))

    @torch.inference_mode()
    def answer(image: str, question: str, tokens: int, mode: str) -> dict[str, Any]:
        attention, cache_kind = mode.split("/")
        model.set_attn_implementation(attention)
        clock = Clock()
        tiles = tile_image(load_image(base64.b64decode(image)), config.vision.image_size, config.max_tiles)
        prompt = prompts.encode([Message("user", question)], [len(tiles)])
        cache = new_cache(model, cache_kind, len(prompt.input_ids) + tokens)
        given = {
            "input_ids": torch.from_numpy(prompt.input_ids)[None],
            "pixel_values": torch.from_numpy(tiles).to(model.dtype),
        }
        answers: list[int] = []
        while len(answers) < tokens:
            logits = model(**given, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            logits[prompts.placeholder_id] = -torch.inf  # the image placeholder is never sampled
            answers.append(int(logits.argmax()))
            clock.tick()
            given = {"input_ids": torch.tensor([answers[-1:]])}
        return clock.answer(answers, len(prompt.input_ids), prompt.placeholders)

    return f"transformers {transformers.__version__}", answer


def new_cache(model: PreTrainedModel, kind: str, tokens: int) -> DynamicCache | StaticCache:
    config = model.config.get_text_config()
    return StaticCache(config=config, max_cache_len=tokens) if kind == "static" else DynamicCache(config=config)


if __name__ == "__main__":
    main()
