"""Writes texts of an exact number of tokens."""

from __future__ import annotations

import bisect

import numpy as np

from nvlm_trt.errors import RequestError
from nvlm_trt.prompt.tokenizer import Tokenizer

_WORDS: list[str] = str.split(
    "the of to and in is it you that was for on are with as his they be at one have this from or had by hot but some "
    "what there we can out other were all your when up use word how said an each she which do their time if will way "
    "about many then them would write like so these her long make thing see him two has look more day could go come "
    "did my sound no most number who over know water than call first people may down side been now find"
)
# Fill the rest once no further word fits: for any byte or subword tokenizer, one of the fillers adds a single token.
_FILLERS = (" a", "a", "1", ".", " 1", "e", "x", "-", "q")


class PromptWriter:
    """Writes random English words, and counts the tokens of a text as if it came after a line break.

    In a prompt, a line break precedes the question ("user" or the last image precedes the line break), and a control
    token follows the question.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = len(tokenizer.encode("\n"))

    def count(self, text: str) -> int:
        """Returns the number of tokens that a question's text adds to a prompt."""
        return len(self._tokenizer.encode("\n" + text)) - self._before

    def write(self, tokens: int, rng: np.random.Generator) -> str:
        """Writes a text of `tokens` tokens. Raises RequestError if none of the tried texts has that many."""
        words = [_WORDS[i] for i in rng.integers(len(_WORDS), size=tokens)]  # no word is less than a token
        fitting = bisect.bisect_right(range(tokens + 1), tokens, key=lambda n: self.count(" ".join(words[:n]))) - 1
        text = " ".join(words[:fitting])
        while (count := self.count(text)) < tokens:
            longer = (text + filler for filler in _FILLERS)
            text = next((candidate for candidate in longer if count < self.count(candidate) <= tokens), "")
            if not text:
                break
        if self.count(text) != tokens:
            raise RequestError(
                f"no text of exactly {tokens} tokens was found for this tokenizer; ask for other lengths"
            )
        return text
