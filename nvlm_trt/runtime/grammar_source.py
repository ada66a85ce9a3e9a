"""Writes a constraint as a grammar of llguidance, and sets the limits within which llguidance follows it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from nvlm_trt.constraint import Kind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# At most one between two parts of JSON: more would take tokens, and a small model may write them without end.
_WHITESPACE = " "
_ANY_OBJECT = {"type": "object"}
_CAUSE = re.compile(r"^error: (.*)$", re.MULTILINE)  # of a regular expression, below a drawing of the place
_PLACE = re.compile(r"^at [0-9]+\([0-9]+\): ")
_LONGEST_CAUSE = 300


def grammar_text(kind: Kind, value: Any) -> str:
    """Write a grammar. `value` is what JSON holds of the constraint."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, value)))
    schema = _ANY_OBJECT if kind == "json_object" else value
    # llguidance's own key would change what a schema means
    schema = {key: item for key, item in schema.items() if key != "x-guidance"}
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema, allow_nan=False), overrides={"whitespace_pattern": _WHITESPACE}
    )


def parser_limits() -> LLParserLimits:
    """Return the limits, a part of llguidance's own: they bound the time of a mask and the memory of an answer."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=20_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def start_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar. Raises ValueError with the cause in one line. Lets other threads run."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if matcher.is_error():
        raise ValueError(one_line(matcher.get_error()))
    return matcher


def one_line(message: str) -> str:
    """Return the cause in a message of llguidance."""
    found = _CAUSE.search(message)
    cause = found[1] if found else _PLACE.sub("", message.partition("\n")[0])
    return " ".join(cause.split())[:_LONGEST_CAUSE]
