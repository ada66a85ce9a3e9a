"""Constraints that cannot be followed are refused in one line, and cost little time and memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_backend import CONFIG, byte_tokenizer

from nvlm_trt.api import Constraint, SamplingParams
from nvlm_trt.errors import ParameterError
from nvlm_trt.lane import AbandonedError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.finite_schema import has_finite_answer
from nvlm_trt.runtime.grammar import Grammars
from nvlm_trt.runtime.repetition import patterns_of, repeated
from nvlm_trt.runtime.sampling import Sampler


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return byte_tokenizer(directory)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer, CONFIG.llm.vocab_size)
    yield grammars
    grammars.close()


def integers(names: range) -> dict[str, Any]:
    return {f"p{number}": {"type": "integer"} for number in names}


def references(count: int) -> dict[str, Any]:
    """A schema that refers to the next one, and so on."""
    links = {f"a{n}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{n + 1}"}}} for n in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {"type": "integer"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def crossed(factors: int) -> dict[str, Any]:
    """Requires one of five properties, and one of five others, and so on."""
    return {
        "allOf": [
            {
                "anyOf": [
                    {"type": "object", "properties": integers(range(n, n + 1)), "required": [f"p{n}"]} for n in five
                ]
            }
            for five in (range(5 * factor, 5 * factor + 5) for factor in range(factors))
        ]
    }


ENDLESS = {
    "a schema that is itself": {"$ref": "#"},
    "two schemas that are each other": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "a list without an end": {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    "an array in an array": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "a pair of pairs": {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
    "no way out": {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 2}, {"allOf": [{"$ref": "#"}]}]},
}
FINITE = {
    "a tree": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
    "a list": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    },
    "a reference to an item of a list": {
        "anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/anyOf/0"}, "minItems": 1}]
    },
    "a name with a slash": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{name: ({"json_schema": schema}, "refers to itself without an end") for name, schema in ENDLESS.items()},
    "an unknown type": ({"json_schema": {"type": "text"}}, "Invalid type: text"),
    "a keyword that is not kept": ({"json_schema": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
    "properties of a number": ({"json_schema": {"type": "object", "properties": 3}}, "properties must be an object"),
    "a range without numbers": ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
    "an enum of nothing": ({"json_schema": {"enum": []}}, "Unsatisfiable"),
    "two types at once": ({"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "incompatible types"),
    "a reference to nothing": ({"json_schema": {"$ref": "#/$defs/a"}}, "does not exist"),
    "a reference to elsewhere": ({"json_schema": {"$ref": "http://127.0.0.1:9/a"}}, "does not fetch"),
    "a file": ({"json_schema": {"$ref": "file:///etc/passwd"}}, "does not fetch"),
    "a pattern that is none": ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
    "a thousand references in a row": ({"json_schema": references(1000)}, "nested too deeply"),
    "a thousand arrays in each other": ({"json_schema": nested(400)}, "recursion limit"),
    "a thousand properties that may lack": (
        {"json_schema": {"type": "object", "properties": integers(range(1000))}},
        "",
    ),
    "five to the power of nine": ({"json_schema": crossed(9)}, "schema too large"),
    "multiples of a large number": ({"json_schema": {"type": "integer", "multipleOf": 1_000_003}}, "more than 0.5 s"),
    "two hundred overlapping patterns": (
        {"json_schema": {"type": "object", "patternProperties": {f"^a.*b{n}$": {} for n in range(200)}}},
        "more than 0.5 s",
    ),
    "no regular expression": ({"regex": "(a"}, "unclosed group"),
    "a look-ahead": ({"regex": "(?=a)b"}, "look-around"),
    "a text that cannot be": ({"regex": "[^\\s\\S]"}, "no text fits"),
    "ten gigabytes": ({"regex": "a{100000000}"}, "at most 2000"),
    "more than numbers can tell": ({"regex": "a{99999999999}"}, "decimal literal invalid"),
    "a million": ({"regex": "((a{100}){100}){100}"}, "at most 2000"),
    "a million, in a pattern": ({"json_schema": {"items": {"pattern": "((a{100}){100}){100}"}}}, "at most 2000"),
    "a million, in a name": ({"json_schema": {"patternProperties": {"(a{1000}){1000}": {}}}}, "at most 2000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_constraint_that_cannot_be_followed(grammars: Grammars, name: str) -> None:
    values, cause = REFUSED[name]
    with pytest.raises(ParameterError) as refused:
        grammars.compile(Constraint(**values))
    message = str(refused.value)
    assert message.startswith(f"sampling parameter constraint.{next(iter(values))} cannot be followed: ")
    assert cause in message
    assert "\n" not in message
    assert len(message) < 500
    assert grammars.compile(Constraint(regex="after that")).start().allows(ord("a"))


@pytest.mark.parametrize("name", FINITE)
def test_a_schema_that_refers_to_itself_and_ends(grammars: Grammars, name: str) -> None:
    assert has_finite_answer(FINITE[name])
    grammars.compile(Constraint(json_schema=FINITE[name]))


LARGE: dict[str, dict[str, Any]] = {
    "a thousand properties": {
        "json_schema": {"properties": integers(range(1000)), "required": [*integers(range(1000))]}
    },
    "5000 texts": {"json_schema": {"enum": [f"the text {number}" for number in range(5000)]}},
    "4096 choices": {"choice": [f"the choice {number}" for number in range(4096)]},
    "a million characters": {"json_schema": {"type": "string", "maxLength": 1_000_000}},
    "a million items": {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}},
    "fifty references in a row": {"json_schema": references(50)},
    "fifty arrays in each other": {"json_schema": nested(50)},
    "2000 letters": {"regex": r"\p{L}{2000}"},
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_and_harmless(grammars: Grammars, name: str) -> None:
    assert grammars.compile(Constraint(**LARGE[name])).start().allowed().any()


def test_the_trial_begins_anew_after_its_end(grammars: Grammars) -> None:
    grammars.compile(Constraint(regex="a"))
    process = grammars._trial._process
    assert process is not None
    process.kill()
    process.wait()
    grammars.compile(Constraint(regex="b"))
    assert grammars._trial._process is not process


def test_a_request_that_is_over_waits_for_no_trial(grammars: Grammars) -> None:
    with grammars._trial._lane.turn(), pytest.raises(AbandonedError):
        grammars.compile(Constraint(regex="not tried yet"), lambda: True)


def test_a_tokenizer_that_llguidance_refuses(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """A server starts all the same: here the tokenizer has more tokens than logits have columns."""
    grammars = Grammars(tokenizer, 100)
    grammars.prepare()
    assert "is not allowed with this engine's tokenizer" in caplog.text
    with pytest.raises(ParameterError, match="is not allowed with this engine's tokenizer"):
        grammars.compile(Constraint(regex="a"))
    grammars.close()


def test_an_answer_ends_with_an_error_where_a_step_takes_too_much(grammars: Grammars) -> None:
    """The trial makes up the beginning of an answer only, and the work is behind that."""
    rest = {"type": "object", "properties": integers(range(1000))}
    properties = {"first": {"type": "string", "minLength": 100}, "rest": rest}
    schema = {"type": "object", "properties": properties, "required": ["first", "rest"], "additionalProperties": False}
    state = grammars.compile(Constraint(json_schema=schema)).start()
    sampler = Sampler(SamplingParams(), np.empty(0, np.int64), grammar=state)
    logits = np.zeros(CONFIG.llm.vocab_size, np.float32)
    logits[[ord('"'), ord("z")]] = [2, 1]
    with pytest.raises(
        ParameterError, match="sampling parameter constraint.json_schema takes too much work .*; simplify it"
    ):
        for _ in range(300):
            sampler.sample(logits)


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("abc", 0),
        ("a{3}", 3),
        ("a{2}(bc){2}", 6),
        ("(a{2}){100}", 200),
        ("((a{10}){10}){10}", 1000),
        ("(a{10}b){10}", 110),
        ("[a{5}]{2}", 2),
        (r"\{5}[\]{9}]", 0),
        ("a{,5}", 5),
        ("a{5,}", 5),
        ("a{3}{4}", 12),
        ("a{0}", 0),
        ("(((", 0),
        ("a{99999999999}", 0),
        ("a{}{x}", 0),
    ],
)
def test_what_repetitions_write_out(pattern: str, parts: int) -> None:
    assert repeated(pattern) == parts


def test_patterns_are_found_wherever_they_are() -> None:
    schema = {"anyOf": [{"items": {"pattern": "a"}}], "patternProperties": {"b": {"pattern": "c"}}, "pattern": 7}
    assert set(patterns_of("json_schema", schema)) == {"a", "b", "c"}
    assert list(patterns_of("regex", "a")) == ["a"]
    assert not list(patterns_of("choice", ["a{5}"]))


MALFORMED: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "give exactly one of json_schema, json_object, regex, choice"),
    "two": ({"regex": "a", "json_object": True}, "json_object and regex; give exactly one"),
    "no kind": ({"grammar": "a"}, "has no 'grammar'"),
    "a text": ("regex", "an object with one of"),
    "json_object that is false": ({"json_object": False}, "constraint.json_object is not allowed; it is true"),
    "a schema as text": ({"json_schema": "{}"}, "constraint.json_schema is not allowed"),
    "a choice of nothing": ({"choice": []}, "constraint.choice is not allowed; it is a list of 1 to 4096 texts"),
    "a choice of an empty text": ({"choice": ["a", ""]}, "constraint.choice is not allowed"),
    "a choice of a number": ({"choice": [1]}, "constraint.choice is not allowed"),
    "an empty expression": ({"regex": ""}, "constraint.regex is not allowed"),
    "a long expression": ({"regex": "a" * 200_000}, "has 200002 bytes as JSON; at most 131072"),
    "NaN": ({"json_schema": {"const": float("nan")}}, "is not JSON"),
    "an object": ({"json_schema": {"const": object()}}, "is not JSON"),
    "ten thousand levels": ({"json_schema": nested(100_000)}, "is not JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_constraint_that_is_none(name: str) -> None:
    value, cause = MALFORMED[name]
    with pytest.raises(ParameterError) as refused:
        SamplingParams(constraint=value)
    assert cause in str(refused.value)
    assert str(refused.value).startswith("sampling parameter constraint")
    assert "\n" not in str(refused.value)


def test_contradictory_parameters() -> None:
    with pytest.raises(ParameterError, match="ignore_eos = True is not allowed with constraint"):
        SamplingParams(constraint=Constraint(regex="a"), ignore_eos=True)


def test_without_llguidance(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llguidance" else find_spec(name, *a)
    )
    grammars.prepare()
    with pytest.raises(ParameterError, match=r"needs llguidance; install with: pip install 'nvlm-trt\[structured\]'$"):
        grammars.compile(Constraint(regex="a"))
