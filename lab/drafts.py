"""Measures what drafts save where an answer repeats its prompt, and what they cost where it does not.

    python -m lab.drafts --work WORK

One answer at a time, with and without drafts. The model has random weights, so its answers are written here: each
token's logits get the next token of a script as their maximum. The scripts: the prompt again, the prompt with every
eighth token changed, and tokens of which none occurs twice. Answers have to be the scripts. Tokens/s count from the
first token of an answer to its last.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np

from lab.common import parser, run
from lab.engines import random_engine
from lab.known_images import Started, open_without_vision, question
from lab.rounds import Contender, Rounds
from nvlm_trt.backends.base import BackendArray, FloatArray, IntArray, RangeArray, StepBackend
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

RESULT = "drafts.json"
WITH, WITHOUT = "with drafts", "without"
CERTAIN = 1e4  # a logit above all others
REPEATS, CHANGED, NEW = "prompt repeated, tokens/s", "every eighth changed, tokens/s", "nothing repeated, tokens/s"


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precision", default="int8-weight-only")
    made.add_argument("--tokens", type=int, default=256, help="of prompt and answer")
    made.add_argument("--draft-tokens", type=int, default=16)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    writer = PromptWriter(Tokenizer.from_directory(engine.path))
    text = writer.write(arguments.tokens, np.random.default_rng(0))
    with open_without_vision(engine, arguments.threads, RuntimeOptions()) as pipeline:
        prompt = pipeline._prompt_encoder.encode([question(text)]).input_ids
        script = Script(pipeline._generator._backend, len(prompt))  # type: ignore[attr-defined]
        scripts = written(prompt, arguments.tokens, engine.config.llm.vocab_size, {engine.config.image_token_id})
        contenders = {
            name: contender(pipeline, text, script, scripts, drafted)
            for name, drafted in {WITH: arguments.draft_tokens, WITHOUT: 0}.items()
        }
        rounds.run(contenders, arguments.rounds)
    rounds.report([(metric, WITH, WITHOUT) for metric in (REPEATS, CHANGED, NEW)])


def written(prompt: IntArray, tokens: int, vocab_size: int, never: set[int | None]) -> dict[str, IntArray]:
    """Returns the answers [tokens] by metric."""
    random = np.random.default_rng(1)
    unused = np.setdiff1d(np.arange(min(vocab_size, 50_000)), [*prompt, *(token for token in never if token)])
    new = random.permutation(unused)[: 2 * tokens]
    repeated = np.resize(prompt, tokens)
    changed = repeated.copy()
    changed[7::8] = new[tokens : tokens + len(changed[7::8])]
    return {REPEATS: repeated, CHANGED: changed, NEW: new[:tokens]}


class Script:
    """Makes a backend certain of the tokens of a script, which begins behind a prompt."""

    def __init__(self, backend: StepBackend, prompt_tokens: int) -> None:
        self.tokens: IntArray = np.zeros(0, np.int64)
        self._start = prompt_tokens
        self._prefill, self._decode, self._score = backend.prefill, backend.decode, backend.score_tokens
        backend.prefill, backend.decode, backend.score_tokens = (  # type: ignore[method-assign]
            self.prefill,
            self.decode,
            self.score_tokens,
        )

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        logits = self._prefill(slot, position, input_ids, embeddings, cross_ranges, wants_logits)
        return self._sure(logits[None], np.array([position + len(input_ids)]))[0] if wants_logits else logits

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        return self._sure(self._decode(input_ids, positions, cross_ranges), positions + 1)

    def score_tokens(self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray) -> FloatArray:
        logits = self._score(slot, position, input_ids, cross_ranges)
        assert logits is not None
        return self._sure(logits, position + 1 + np.arange(len(input_ids)))

    def _sure(self, logits: FloatArray, positions: IntArray) -> FloatArray:
        """Changes logits [n, vocab] of the tokens before `positions` [n]."""
        for row, index in zip(logits, positions - self._start, strict=True):
            if 0 <= index < len(self.tokens):
                row[self.tokens[index]] = CERTAIN
        return logits


def contender(
    pipeline: Pipeline, text: str, script: Script, scripts: Mapping[str, IntArray], draft_tokens: int
) -> Contender:
    def measure() -> Mapping[str, float]:
        speeds = {}
        for metric, tokens in scripts.items():
            script.tokens = tokens
            asked = Started(pipeline, [question(text)], len(tokens), draft_tokens=draft_tokens)
            answered = asked.wait()
            assert answered.token_ids == tokens.tolist(), "the answer is not the script"
            speeds[metric] = len(answered.gaps) / sum(answered.gaps)
        return speeds

    return measure


if __name__ == "__main__":
    run(options(), measure, RESULT)
