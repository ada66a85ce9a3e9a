"""Draws JSON schemas, of every keyword that constraints keep."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = st.sampled_from(["a", "b", "ab", "name", "größe", 'quo"te', "with space", "url", "$ref"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-1000, 1000), st.sampled_from([0.5, -2.25]), st.text(max_size=6)
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.sampled_from(["x", "y"]), SCALARS, max_size=2)
)


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    kind = draw(st.sampled_from(["length", "pattern", "format"]))
    if kind == "pattern":
        pattern = draw(st.sampled_from(["^[a-c]{1,4}$", "^[0-9]{3}-[a-z]{0,3}$", "b+", "^(yes|no)$", "^\\w\\.$"]))
        return {"type": "string", "pattern": pattern, "maxLength": 12}
    if kind == "format":
        return {"type": "string", "format": draw(st.sampled_from(["ipv4", "ipv6", "uuid"]))}
    least = draw(st.integers(0, 4))
    return {"type": "string", "minLength": least, "maxLength": draw(st.integers(least, 9))}


@st.composite
def numbers(draw: st.DrawFn) -> Schema:
    kind = draw(st.sampled_from(["integer", "number"]))
    least = draw(st.integers(-300, 300))
    schema: Schema = {"type": kind, "minimum": least, "maximum": least + draw(st.integers(10, 500))}
    if draw(st.booleans()):
        schema["multipleOf"] = draw(st.sampled_from([2, 5, 10] if kind == "integer" else [0.5, 0.25]))
    elif draw(st.booleans()):
        schema["exclusiveMinimum"] = schema.pop("minimum")
    return schema


LEAVES = st.one_of(
    strings(),
    numbers(),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": ["integer", "null"], "minimum": 0, "maximum": 99}),
    st.builds(lambda value: {"const": value}, VALUES),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=4)),
    st.just({"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 5}]}),
    st.just({"$ref": "#/$defs/pair"}),
    st.just({"$ref": "#/$defs/chain"}),
)


@st.composite
def arrays(draw: st.DrawFn, items: st.SearchStrategy[Schema]) -> Schema:
    schema: Schema = {"type": "array", "items": draw(st.one_of(items, st.just(False)))}
    if draw(st.booleans()):
        schema["prefixItems"] = draw(st.lists(items, min_size=1, max_size=2))
    if schema["items"] is not False:
        schema["minItems"] = draw(st.integers(0, 2))
        schema["maxItems"] = schema["minItems"] + draw(st.integers(0, 2))
    return schema


@st.composite
def objects(draw: st.DrawFn, items: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(NAMES, items, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    others = draw(st.one_of(st.just(False), items))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": others}


def _deeper(items: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    options = st.lists(items, min_size=1, max_size=3)
    either = st.tuples(strings(), objects(items)).map(lambda both: {"oneOf": list(both)})
    return st.one_of(arrays(items), objects(items), options.map(lambda several: {"anyOf": several}), either)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    schema = draw(st.recursive(LEAVES, _deeper, max_leaves=6))
    pair = {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2}
    chain = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#/$defs/chain"}, {"type": "null"}]}},
        "required": ["next"],
        "additionalProperties": False,
    }
    return {**schema, "$defs": {"pair": pair, "chain": chain}}
