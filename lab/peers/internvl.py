"""Gives peers what InternVL's checkpoints have and NVLM's do not: image tags in the vocabulary, and the prompt's text.

Imports Python's own modules only: it runs in the peers' environment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
MESSAGE_END = "<|im_end|>"


def prompt_text(image: str, question: str) -> str:
    """Writes a question about one image as ChatML, with the product's system message. `image` stands for the image."""
    return (
        f"<|im_start|>system\nAnswer the questions.{MESSAGE_END}\n"
        f"<|im_start|>user\n{image}\n{question}{MESSAGE_END}\n<|im_start|>assistant\n"
    )


@dataclass(frozen=True)
class Vocabulary:
    """The byte-level vocabulary of a random checkpoint with InternVL's tags: a token for every id of the model."""

    tokens: list[str]
    control: frozenset[int]
    merge: tuple[str, str]  # of two zero bytes: some readers ask for a merge
    tokenizer: dict[str, Any]  # tokenizer.json

    @classmethod
    def of(cls, checkpoint: Path) -> Vocabulary:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
        model, added = tokenizer["model"], tokenizer["added_tokens"]
        size = len(model["vocab"]) + len(added)
        for number, name in enumerate((IMAGE_START, IMAGE_CONTEXT, IMAGE_END), start=size):
            added.append({**added[-1], "id": number, "content": name})
        ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        zero = min(ids, key=ids.__getitem__)
        ids[2 * zero] = len(ids)
        ids |= {f"[PAD{number}]": number for number in range(len(ids), config["llm_config"]["vocab_size"])}
        tokens = sorted(ids, key=ids.__getitem__)
        assert [ids[token] for token in tokens] == list(range(len(tokens))), "ids without a token"
        # a tokenizer gives added tokens the ids that its vocabulary has for them
        model |= {"vocab": ids, "merges": [f"{zero} {zero}"]}
        return cls(tokens, frozenset(token["id"] for token in added), (zero, zero), tokenizer)
