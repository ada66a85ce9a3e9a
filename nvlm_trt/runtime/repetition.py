"""Counts what the counted repetitions of a regular expression repeat: the time of a mask grows with its square."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nvlm_trt.constraint import Kind

MOST_REPEATED = 2000
_COUNT = re.compile(r"\{([0-9]{0,9})(?:,([0-9]{0,9}))?\}")  # llguidance refuses larger numbers
_CLASS_START = re.compile(r"\[\^?\]?")


def patterns_of(kind: Kind, value: Any) -> Iterator[str]:
    """Yield the regular expressions of a constraint."""
    if kind == "regex":
        yield value
    rest = [value] if kind == "json_schema" else []
    while rest:
        part = rest.pop()
        if isinstance(part, dict):
            if isinstance(part.get("pattern"), str):
                yield part["pattern"]
            if isinstance(part.get("patternProperties"), dict):
                yield from part["patternProperties"]
            rest += part.values()
        elif isinstance(part, list):
            rest += part


def repeated(pattern: str) -> int:
    """Count the characters, classes and the like that counted repetitions write out: 6 in `a{2}(bc){2}`, and 200 in
    `(a{2}){100}`. A pattern that is malformed gives any number."""
    return _Scan(pattern).most()


class _Scan:
    """Reads a regular expression once. `sizes` has, for each open group, the size of its parts so far, repeated ones
    written out, and the part of that which repetitions made."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def most(self) -> int:
        size, made = [0], [0]
        part = part_made = 0  # of the last atom, which a count may follow
        while self._at < len(self._pattern):
            if (count := self._count()) is not None:
                size[-1] += part * (count - 1)
                made[-1] += max(part * count, part_made) - part_made if count > 1 else 0
                part, part_made = part * count, max(part * count, part_made)
                continue
            character = self._pattern[self._at]
            if character == "(":
                size.append(0)
                made.append(0)
                self._at += 1
                part = part_made = 0
                continue
            if character == ")" and len(size) > 1:
                part, part_made = max(1, size.pop()), made.pop()
                self._at += 1
            else:
                self._skip_atom()
                part, part_made = 1, 0
            size[-1] += part
            made[-1] += part_made
        return sum(made)

    def _count(self) -> int | None:
        """Read `{m}`, `{m,}` or `{m,n}`; return the larger number."""
        found = _COUNT.match(self._pattern, self._at)
        if found is None or not (found[1] or found[2]):
            return None
        self._at = found.end()
        return max(int(found[1] or 0), int(found[2] or 0), 1)

    def _skip_atom(self) -> None:
        """Pass one character, escape or class."""
        if self._pattern[self._at] == "\\":
            self._at += 2
            return
        if self._pattern[self._at] != "[":
            self._at += 1
            return
        start = _CLASS_START.match(self._pattern, self._at)
        assert start is not None
        self._at = start.end()
        depth = 1  # a class may hold classes
        while depth and self._at < len(self._pattern):
            character = self._pattern[self._at]
            depth += (character == "[") - (character == "]")
            self._at += 2 if character == "\\" else 1
