"""Trains the tiny models' tokenizer: byte-level BPE with the words of TinyDocs; codes stay single letters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, ask, draw
from nvlm_trt.evaluation.tinydocs.kinds import PLACES
from nvlm_trt.prompt.encoder import SYSTEM_MESSAGE
from nvlm_trt.prompt.tokenizer import format_tokens, write_tokenizer_files

# a word with the space before it; a capital or digit alone, unless a capital begins a word
_WORDS = Regex(r" ?[A-Z][a-z]+| ?[a-z]+|[A-Z0-9]|\s|[^\sA-Za-z0-9]")


def write_tiny_tokenizer(directory: Path, vocab_size: int, max_tiles: int, rounds: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json of at most `vocab_size` ids, the prompt format's included.

    The tokenizer learns its words from `rounds` rounds of questions of every task.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(format_tokens(max_tiles)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_corpus(rounds), trainer)
    write_tokenizer_files(raw, directory, max_tiles)


def _corpus(rounds: int) -> Iterator[str]:
    random = np.random.default_rng(0)
    for _ in range(rounds):
        yield f"system\n{SYSTEM_MESSAGE}"
        yield "user\n"
        yield "assistant\n"
        yield from (" " + place for place in PLACES)
        yield from PLACES
        for task in TASKS:
            for question in draw("train", task, random)[1]:
                yield question.prompt
                yield question.answer
        for task in TEXT_TASKS:
            yield ask(task, random).prompt
