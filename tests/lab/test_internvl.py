"""Peers read the prompt that the product reads, except for the tags of images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers

from lab.peers.internvl import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, Vocabulary, prompt_text
from nvlm_trt.api import Message
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer

QUESTION = "How many naïve tiles – of 7?"
Checkpoints = Callable[[str], Path]


def test_every_id_has_a_token_that_decodes(checkpoint: Checkpoints) -> None:
    directory = checkpoint("nvlm-d-tiny")
    vocabulary = Vocabulary.of(directory)
    raw = tokenizers.Tokenizer.from_str(json.dumps(vocabulary.tokenizer))
    assert len(vocabulary.tokens) == json.loads((directory / "config.json").read_text())["llm_config"]["vocab_size"]
    assert [raw.id_to_token(number) for number in range(len(vocabulary.tokens))] == vocabulary.tokens
    assert {raw.token_to_id(name) for name in (IMAGE_START, IMAGE_CONTEXT, IMAGE_END)} <= vocabulary.control
    assert set(raw.get_added_tokens_decoder()) == vocabulary.control


def test_the_prompt_is_the_products_around_the_image(checkpoint: Checkpoints) -> None:
    directory = checkpoint("nvlm-d-tiny")
    with Checkpoint.open(directory) as source:
        encoder = PromptEncoder(source.config, Tokenizer.from_directory(directory))
    ours = encoder.encode([Message("user", QUESTION)], [1]).input_ids.tolist()
    raw = tokenizers.Tokenizer.from_str(json.dumps(Vocabulary.of(directory).tokenizer))
    theirs = raw.encode(prompt_text(IMAGE_START + IMAGE_CONTEXT + IMAGE_END, QUESTION), add_special_tokens=False).ids
    start = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    assert raw.id_to_token(theirs[start]) == IMAGE_START
    assert ours[-(len(theirs) - start - 3) :] == theirs[start + 3 :]
