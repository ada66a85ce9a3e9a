"""Answers a chat with the PyTorch oracle alone: no batch, no chunks, no masks, no prompt table."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nvlm_trt.api import ChatRequest
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.prompt.conversation import lift_images
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.runtime.sampling import Logprobs, Sampler


@lru_cache(maxsize=4)
def oracle(checkpoint: Path) -> ReferenceModel:
    return ReferenceModel.from_checkpoint(checkpoint)


def image_tokens(engine: Engine, image: Any) -> torch.Tensor:
    """The tokens [tiles, T, hidden] of the engine's vision encoder, of a file, or those that the caller has."""
    if not isinstance(image, bytes):
        return torch.from_numpy(image)
    tiles = tile_image(load_image(image), engine.config.vision.image_size, engine.limits.max_tiles)
    with open_backend(engine, ["vision_encoder"]) as vision:
        return torch.from_numpy(vision.to_host(vision.encode(tiles)))


@torch.no_grad()
def answer_alone(engine: Engine, checkpoint: Path, chat: ChatRequest) -> list[tuple[int, Logprobs | None]]:
    """Returns the tokens, up to and with the first stop id."""
    model, config = oracle(checkpoint), engine.config
    tokenizer = Tokenizer.from_directory(engine.path)
    encoder = PromptEncoder(config, tokenizer)
    messages, images = lift_images(chat.messages, chat.images)
    tokens = [image_tokens(engine, image) for image in images]
    prompt = encoder.encode(messages, [len(one) for one in tokens])
    in_llm, crossed = [], []
    for one in tokens:
        llm_part, cross_part = split_tiles(config.architecture, len(one))
        in_llm.append(one[llm_part].flatten(0, 1))
        part = one[cross_part]
        if config.architecture == "H":
            tags = torch.from_numpy(encoder.tag_ids(config.max_tiles))[: len(part)]
            part = torch.cat([model.language_model.embed(tags), part], dim=1)
        crossed.append(part.flatten(0, 1))
    rows, features = (torch.cat([torch.zeros(0, config.llm.hidden_size), *parts]) for parts in (in_llm, crossed))
    cross_kv = model.language_model.cross_kv(features) if len(features) else None
    sampler = Sampler(chat.sampling, prompt.input_ids, {model.image_token_id})
    ids, ranges = torch.from_numpy(prompt.input_ids)[None], torch.from_numpy(prompt.cross_ranges)[None]
    everything = torch.tensor([[prompt.decode_range]], dtype=ranges.dtype)
    generated: list[tuple[int, Logprobs | None]] = []
    cache = None
    while len(generated) < min(chat.sampling.max_tokens, engine.limits.max_seq_len - len(prompt.input_ids)):
        logits, cache = model(ids, rows if len(generated) == 0 and len(rows) else None, cross_kv, ranges, cache)
        generated.append(sampler.sample(logits[0, -1].numpy()))
        token_id = generated[-1][0]
        if token_id in tokenizer.stop_ids and not chat.sampling.ignore_eos:
            break
        ids, ranges = torch.tensor([[token_id]]), everything
    return generated
