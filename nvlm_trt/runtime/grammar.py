"""Follows constraints token by token: says which tokens may come next, and when an answer is complete."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from nvlm_trt.constraint import Constraint, Kind
from nvlm_trt.errors import ParameterError
from nvlm_trt.extras import missing_packages
from nvlm_trt.lane import IsOver, never
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.grammar_source import grammar_text, one_line, start_matcher
from nvlm_trt.runtime.grammar_trial import GrammarTrial

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

_EXTRA = "structured"
_KEPT = 16  # compiled constraints, of some megabytes at most each

BoolArray = npt.NDArray[np.bool_]


class Grammars:
    """Compiles constraints for one tokenizer, and keeps the last ones. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Prepare for nothing yet. Logits have `vocab_size` columns."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tokens: LLTokenizer | None = None
        self._trial = GrammarTrial()
        self._kept: LRUCache[tuple[str, str], Grammar] = LRUCache(_KEPT)
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Prepare the tokenizer if llguidance is installed. With 150,000 tokens that takes seconds, in which no other
        thread of this process runs."""
        if missing_packages(_EXTRA):
            return
        try:
            self._prepared()
        except ParameterError as error:
            logger.warning("%s", error)

    def compile(self, constraint: Constraint, is_over: IsOver = never) -> Grammar:
        """Compile a constraint; a trial has bounded the time. Raises ParameterError for one that cannot be followed,
        and AbandonedError once `is_over` returns True while it waits for its trial."""
        if missing := missing_packages(_EXTRA):
            raise ParameterError(
                f"sampling parameter constraint needs {', '.join(missing)}; install with: pip install "
                f"'nvlm-trt[{_EXTRA}]'"
            )
        key = constraint.kind, constraint.to_json()
        with self._lock:
            if kept := self._kept.get(key):
                return kept
        if fault := self._trial.fault(constraint, is_over):
            raise ParameterError(f"sampling parameter constraint.{constraint.kind} cannot be followed: {fault}")
        text = grammar_text(constraint.kind, getattr(constraint, constraint.kind))
        grammar = Grammar(start_matcher(self._prepared(), text), self._vocab_size, constraint.kind)
        with self._lock:
            self._kept[key] = grammar
        return grammar

    def close(self) -> None:
        self._trial.close()

    def _prepared(self) -> LLTokenizer:
        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = _tokens(self._tokenizer, self._vocab_size)
                except ValueError as error:
                    cause = one_line(str(error))
                    raise ParameterError(
                        f"sampling parameter constraint is not allowed with this engine's tokenizer ({cause})"
                    ) from None
            return self._tokens


class Grammar:
    """A compiled constraint, from which every answer starts."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, kind: Kind) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._kind = kind

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy(), self._vocab_size, self._kind)


class GrammarState:
    """Knows how much of a constraint one answer has fulfilled. Raises ParameterError once that takes too much work."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, kind: Kind) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._kind = kind
        self._bits: npt.NDArray[np.uint8] | None = None  # a bit per token; None: not computed yet for the next token

    def allows(self, token_id: int) -> bool:
        """Return whether the next token may be this one."""
        return bool(self._next_bits()[token_id >> 3] >> (token_id & 7) & 1)

    def allowed(self) -> BoolArray:
        """Return whether the next token may be each of the vocabulary [vocab]; tokens that end an answer are among them
        where it may end."""
        return np.unpackbits(self._next_bits(), count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Take an allowed token as the next one of the answer."""
        self._bits = None
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Return whether the answer fulfils the constraint, and nothing may follow."""
        return self._matcher.is_stopped()

    def _next_bits(self) -> npt.NDArray[np.uint8]:
        if self._bits is None:
            self._bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
        return self._bits

    def _check(self) -> None:
        if self._matcher.is_error():
            cause = one_line(self._matcher.get_error())
            raise ParameterError(
                f"sampling parameter constraint.{self._kind} takes too much work here ({cause}); simplify it"
            )


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    from llguidance import LLTokenizer

    slices = LLTokenizer.json_slices()  # groups of tokens that a JSON string allows or forbids as one
    return LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(tokenizer.stop_ids), slices=slices)
