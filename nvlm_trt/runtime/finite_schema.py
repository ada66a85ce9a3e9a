"""Finds JSON schemas that refer to themselves without an end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import unquote


def has_finite_answer(schema: dict[str, Any]) -> bool:
    """Return False if every JSON value that fits a schema would have to hold another that fits it, and so on.

    Looks at references within the schema, required properties and least numbers of items; all else counts as finite."""
    targets = {reference: _target(schema, reference) for reference in _references(schema)}
    finite: set[str] = {reference for reference, target in targets.items() if target is None}
    found = True
    while found:
        found = False
        for reference in targets.keys() - finite:
            if _is_finite(targets[reference], finite):
                finite.add(reference)
                found = True
    return _is_finite(schema, finite)


def _is_finite(schema: Any, finite: Collection[str]) -> bool:
    """Return whether a finite value fits `schema`, if one fits each of the references in `finite` and no other."""
    if not isinstance(schema, dict):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in finite:
        return False
    if not all(_is_finite(part, finite) for part in _list(schema.get("allOf"))):
        return False
    for options in (_list(schema.get("anyOf")), _list(schema.get("oneOf"))):
        if options and not any(_is_finite(option, finite) for option in options):
            return False
    return all(_is_finite(part, finite) for part in _parts(schema))


def _parts(schema: dict[str, Any]) -> Iterator[Any]:
    """Yield the schemas of the parts that every value must have."""
    if schema.get("type") in ("object", ["object"]):
        properties = schema.get("properties")
        for name in _list(schema.get("required")):
            if isinstance(properties, dict) and isinstance(name, str) and name in properties:
                yield properties[name]
    if schema.get("type") in ("array", ["array"]):
        least = schema.get("minItems", 0)
        first = _list(schema.get("prefixItems"))
        if isinstance(least, (int, float)):
            yield from first[: int(least)] if least < len(first) else first
            if least > len(first):
                yield schema.get("items")


def _references(value: Any) -> set[str]:
    found, rest = set(), [value]
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found.add(part["$ref"])
            rest += part.values()
        elif isinstance(part, list):
            rest += part
    return found


def _target(schema: Any, reference: str) -> Any:
    """Return what a JSON pointer such as #/$defs/item refers to; None if that is not known here."""
    if reference == "#":
        return schema
    if not reference.startswith("#/"):
        return None
    for key in unquote(reference[2:]).split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and key.isdecimal() and int(key) < len(schema):
            schema = schema[int(key)]
        elif isinstance(schema, dict) and key in schema:
            schema = schema[key]
        else:
            return None
    return schema


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
