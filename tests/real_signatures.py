"""Makes doubles of TensorRT's and TensorRT-RTX's classes that accept only members and arguments (number, names, types)
of the real ones.

The Python bindings state their signatures in docstrings ("write(self: ..., data: ..., size: ...) -> int"), one for each
overload; a double checks every call against them before it answers.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


class Double:
    """Stands for an object of the real class `kind`. `answers`: member name -> value, or function for a method."""

    def __init__(self, kind: type, **answers: Any) -> None:
        for name in answers:
            assert hasattr(kind, name), f"{kind.__name__} has no {name}"
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_answers", answers)

    def __getattr__(self, name: str) -> Any:
        assert hasattr(self._kind, name), f"{self._kind.__name__} has no {name}"
        if isinstance(getattr(self._kind, name), property):
            assert name in self._answers, f"{self._kind.__name__}.{name} was read; say what it is"
            return self._answers[name]
        answer = self._answers.get(name, lambda *_, **__: True)
        return checked(getattr(self._kind, name), answer, sys.modules[self._kind.__module__])

    def __iter__(self) -> Iterator[Any]:
        """Iterates over nothing: a network is iterated only to ask its layers for their precision, which is gone."""
        assert hasattr(self._kind, "__getitem__"), f"{self._kind.__name__} cannot be iterated"
        return iter(())

    def __setattr__(self, name: str, value: Any) -> None:
        member = getattr(self._kind, name, None)
        assert isinstance(member, property), f"{self._kind.__name__} has no property {name}"
        assert member.fset is not None, f"{self._kind.__name__}.{name} cannot be set"
        self._answers[name] = value


def constructor(kind: type, make: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces a class: checks the arguments of its `__init__`."""
    return checked(kind.__init__, make, sys.modules[kind.__module__])


def checked(real: Any, answer: Callable[..., Any], bindings: ModuleType) -> Callable[..., Any]:
    """Wraps `answer`: it is called only with arguments that one of the overloads of `real` takes, a member of a class
    of `bindings`."""
    overloads = signatures(real.__doc__ or "")
    assert overloads, f"{real} states no signature"

    def call(*arguments: Any, **keywords: Any) -> Any:
        problems = [problem(overload, arguments, keywords, bindings) for overload in overloads]
        if all(problems):
            raise AssertionError(f"{getattr(real, '__name__', real)}: {'; '.join(map(str, problems))}")
        return answer(*arguments, **keywords)

    return call


def signatures(docstring: str) -> list[ast.arguments]:
    """Reads the overloads of a pybind11 function, without self."""
    found = []
    for line in docstring.splitlines():
        match = re.match(r"\s*(?:\d+\. )?(\w+)\((.*)\)(?: -> .*)?$", line)
        if match and match.group(2) != "*args, **kwargs":
            parameters = re.sub(r"= <[^>]*>", "= None", match.group(2)).replace("::", ".")  # a class of C++
            try:
                parsed = ast.parse(f"def f({parameters}): pass").body[0]
            except SyntaxError:
                continue
            assert isinstance(parsed, ast.FunctionDef)
            found.append(parsed.args)
    return found


def problem(
    overload: ast.arguments, arguments: tuple[Any, ...], keywords: dict[str, Any], bindings: ModuleType
) -> str | None:
    """Says why an overload does not take the arguments; None if it takes them."""
    parameters = [a for a in overload.args if a.arg != "self"]
    if len(arguments) > len(parameters):
        return f"{len(arguments)} arguments for {len(parameters)}"
    given = dict(zip((p.arg for p in parameters), arguments))  # noqa: B905, optional ones may be missing
    for name, value in keywords.items():
        if name in given or name not in {p.arg for p in parameters}:
            return f"argument {name} is unknown or given twice"
        given[name] = value
    for parameter in parameters[: len(parameters) - len(overload.defaults)]:
        if parameter.arg not in given:
            return f"argument {parameter.arg} is missing"
    for parameter in parameters:
        if parameter.arg in given and parameter.annotation is not None:
            wanted = ast.unparse(parameter.annotation)
            if not fits(given[parameter.arg], wanted, bindings):
                return f"{parameter.arg} is a {type(given[parameter.arg]).__name__}, not a {wanted}"
    return None


def fits(value: Any, annotation: str, bindings: ModuleType) -> bool:
    name = annotation.rsplit(".", 1)[-1]
    if name == "SupportsInt":
        return hasattr(value, "__int__")
    if name == "Buffer":
        return bool(memoryview(value) is not None)
    if name == "Dims" and isinstance(value, (tuple, list)):
        return True  # converted
    if annotation in ("str", "bool", "int", "tuple", "list"):
        return type(value).__name__ == annotation
    real = getattr(bindings, name, None)
    assert real is not None, f"{annotation} is not checked; say how"
    return (isinstance(value, Double) and issubclass(value._kind, real)) or isinstance(value, real)
