"""Defines what an answer may be bound to: a JSON schema, any JSON object, a regular expression, a choice of texts."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nvlm_trt.errors import ParameterError

MAX_BYTES = 1 << 17  # of a schema or of all choices, as JSON, and of a regular expression
MAX_CHOICES = 4096

Kind = Literal["json_schema", "json_object", "regex", "choice"]
KINDS: tuple[Kind, ...] = ("json_schema", "json_object", "regex", "choice")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_Choices = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1, max_length=MAX_CHOICES),
]


class Constraint(BaseModel):
    """Says what the whole text of an answer must be: exactly one of the fields is given.

    Raises ParameterError. Whether a schema or a regular expression can be followed is found out by the engine.
    The descriptions complete the sentence "it is ..." of an error."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    json_schema: dict[str, Any] | None = Field(None, description="a JSON schema, an object such as {'type': 'object'}")
    json_object: Literal[True] | None = Field(None, description="true")
    regex: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a regular expression of 1 or more characters"
    )
    choice: _Choices | None = Field(None, description=f"a list of 1 to {MAX_CHOICES} texts, none of them empty")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _fault(str(error.errors(include_url=False, include_input=False)[0]["loc"][0])) from None
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ParameterError(
                f"sampling parameter constraint has {' and '.join(given) or 'nothing'}; give exactly one of "
                f"{', '.join(KINDS)}"
            )
        size = len(self.to_json())
        if size > MAX_BYTES:
            raise ParameterError(
                f"sampling parameter constraint.{self.kind} has {size} bytes as JSON; at most {MAX_BYTES} are allowed"
            )

    @property
    def kind(self) -> Kind:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def to_json(self) -> str:
        """Write the value as JSON; equal texts stand for equal constraints of a kind. Keeps the order of keys, in which
        the properties of an object are generated. Raises ParameterError for what JSON has not."""
        try:
            return json.dumps(getattr(self, self.kind), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ParameterError(
                f"sampling parameter constraint.{self.kind} is not JSON ({error}); pass numbers, strings, lists, dicts"
            ) from None


def _fault(name: str) -> ParameterError:
    field = Constraint.model_fields.get(name)
    if field is None:
        return ParameterError(f"sampling parameter constraint has no {name[:40]!r}; it has one of {', '.join(KINDS)}")
    return ParameterError(f"sampling parameter constraint.{name} is not allowed; it is {field.description}")
