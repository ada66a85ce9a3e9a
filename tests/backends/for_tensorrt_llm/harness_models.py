"""Asks tiny models, once our PyTorch oracle and once the networks that TensorRT-LLM's front end builds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from harness_network import MAX_BATCH
from harness_ranks import Ranks
from layer_reading import Array

from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, Mapping, write_llm_checkpoint
from nvlm_trt.progress import no_progress
from nvlm_trt.reference.model import ReferenceModel

TILES = 2
PROMPT_TABLE = 64
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Question:
    """One request: ids [S], with image placeholders, and what its tokens cross-attend."""

    ids: Array
    image_tokens: Array  # [M, hidden]: image embeddings of the placeholders
    features: Array  # [C, hidden]; a request without an image has one row of zeros
    ranges: Array  # [S, 2]


@cache
def oracle(checkpoint: Path) -> ReferenceModel:
    """Load a model with its weights rounded to bf16 as in the ranks. It computes in float32."""
    return ReferenceModel.from_checkpoint(checkpoint, torch.bfloat16).float()


def question(checkpoint: Path, tokens: int = 24, kind: str = "tags", seed: int = 0) -> Question:
    """Make a request of random tokens. `kind`: "tags" (two tags read their own tiles, later tokens everything), "all"
    (every token reads everything) or "none" (text only)."""
    config = oracle(checkpoint).config
    random = np.random.default_rng(seed)
    hidden, per_tile = config.llm.hidden_size, config.tokens_per_tile
    with_image = kind != "none"
    ids = random.integers(0, 256, tokens)
    embeddings = np.zeros((0, hidden), np.float32)
    if with_image and config.architecture in "DH":
        embeddings = random.standard_normal((4, hidden), dtype=np.float32)
        ids[5:9] = config.image_token_id
    ranges = np.zeros((tokens, 2), np.int64)
    features = np.zeros((1, hidden), np.float32)
    if with_image and config.architecture in "XH":
        features = random.standard_normal((TILES * per_tile, hidden), dtype=np.float32)
        ranges[:] = (0, len(features)) if kind == "all" else (0, 0)
        if kind == "tags":
            ranges[3:6], ranges[6:9], ranges[9:] = (0, per_tile), (per_tile, 2 * per_tile), (0, 2 * per_tile)
    return Question(ids, embeddings, features, ranges)


@torch.no_grad()
def expected(checkpoint: Path, asked: Question, tokens: int) -> Array:
    """Return the oracle's logits [vocab] after the first `tokens` tokens."""
    model = oracle(checkpoint)
    ids = torch.from_numpy(asked.ids)[None, :tokens]
    placeholders = int((ids == model.image_token_id).sum())
    image_tokens = torch.from_numpy(asked.image_tokens[:placeholders]) if placeholders else None
    cross_kv = None
    if asked.ranges.any():
        cross_kv = model.language_model.cross_kv(torch.from_numpy(asked.features))
    logits, _ = model(ids, image_tokens, cross_kv, torch.from_numpy(asked.ranges)[None, :tokens])
    return np.asarray(logits[0, -1])


def feeds(checkpoint: Path, asked: list[Question], lengths: list[int], dtype: str = "float32") -> dict[str, Array]:
    """Make the inputs of padded requests as TensorRT-LLM's runtime does: the prompt table, and a mask whose rows are
    True behind a request's own cross-attended tokens."""
    config = oracle(checkpoint).config
    batch, width = len(asked), max(lengths)
    hidden, columns = config.llm.hidden_size, max(len(one.features) for one in asked)
    table_rows = max(1, *(len(one.image_tokens) for one in asked))
    table = np.zeros((batch * table_rows, hidden), np.float32)
    ids, attention = np.zeros((batch, width), np.int32), np.zeros((batch, width), np.int32)
    output, mask = np.zeros((batch, columns, hidden), np.float32), np.ones((batch, width, columns), np.bool_)
    for row, (one, length) in enumerate(zip(asked, lengths, strict=True)):
        own = one.ids.copy()
        places = own == config.image_token_id
        own[places] = config.llm.vocab_size + np.arange(places.sum())
        ids[row, :length], attention[row, :length] = own[:length], 1
        table[row * table_rows : row * table_rows + len(one.image_tokens)] = one.image_tokens
        count = len(one.features)
        output[row, :count] = one.features
        tokens = np.arange(count)
        mask[row, :length, :count] = (tokens >= one.ranges[:length, :1]) & (tokens < one.ranges[:length, 1:])
    return {
        "input_ids": ids,
        "position_ids": np.tile(np.arange(width, dtype=np.int32), (batch, 1)),
        "attention_mask": attention,
        "last_token_ids": np.array(lengths, np.int32),
        "prompt_embedding_table": table.astype(DTYPES[dtype]),
        "tasks": np.arange(batch, dtype=np.int32)[:, None],
        "prompt_vocab_size": np.array([table_rows], np.int32),
        "encoder_output": output.astype(DTYPES[dtype]),
        "encoder_input_lengths": np.array([len(one.features) for one in asked], np.int32),
        "cross_attention_mask": mask,
        "skip_cross_attn_blocks": np.array([not any(one.ranges.any() for one in asked)]),
    }


def write_ranks(checkpoint: Path, directory: Path, tp: int = 1, pp: int = 1) -> Path:
    """Write the ranks of a model with the product's writer."""
    config = oracle(checkpoint).config
    limit = TILES * config.tokens_per_tile if config.cross_layers else 0
    write_llm_checkpoint(checkpoint, config, directory, LlmQuantization(), Mapping(tp, pp), limit, no_progress)
    return directory


def padded_difference(
    checkpoint: Path, directory: Path, tp: int = 1, pp: int = 1, dtype: str = "float32"
) -> tuple[float, float]:
    """Ask the ranks of a model, alone and in one batch, in all kinds and after several tokens of the prompt.

    Return the largest difference of a logit from the oracle's, and the largest logit."""
    ranks = Ranks(write_ranks(checkpoint, directory, tp, pp), tp, pp, PROMPT_TABLE, dtype)
    requests = {kind: question(checkpoint, 24, kind, seed) for seed, kind in enumerate(("tags", "all", "none"))}
    batches = [[("tags", tokens)] for tokens in (3, 4, 7, 24)]
    batches += [[("all", 24)], [("none", 24)], [("tags", 24), ("none", 15), ("all", 9)]]
    assert max(map(len, batches)) <= MAX_BATCH
    difference = largest = 0.0
    for batch in batches:
        asked, lengths = [requests[kind] for kind, _ in batch], [tokens for _, tokens in batch]
        found = ranks.run(feeds(checkpoint, asked, lengths, dtype))
        for row, (one, tokens) in enumerate(zip(asked, lengths, strict=True)):
            wanted = expected(checkpoint, one, tokens)
            assert np.isfinite(found[row]).all()
            difference = max(difference, float(np.abs(found[row, : len(wanted)] - wanted).max()))
            largest = max(largest, float(np.abs(wanted).max()))
    return difference, largest


def text_is_untouched(checkpoint: Path, directory: Path) -> bool:
    """Ask text only, beside a request with an image, with features of zeros and of NaN, and alone with the blocks
    skipped and not. Return whether the logits are the same bits."""
    ranks = Ranks(write_ranks(checkpoint, directory), 1, 1, PROMPT_TABLE)
    text, other = question(checkpoint, 24, "none"), question(checkpoint, 24, "tags")
    unreadable = replace(text, features=np.full_like(text.features, np.nan))
    beside = [ranks.run(feeds(checkpoint, [asked, other], [24, 24]))[0] for asked in (text, unreadable)]
    alone = feeds(checkpoint, [text], [24])
    assert alone["skip_cross_attn_blocks"].all()
    not_skipped = {**alone, "skip_cross_attn_blocks": np.array([False])}
    skipping = [ranks.run(given)[0] for given in (alone, not_skipped)]
    return all(np.isfinite(a).all() and a.tobytes() == b.tobytes() for a, b in (beside, skipping))
