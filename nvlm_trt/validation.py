"""Validates values from outside by pydantic: frozen dataclasses, and pydantic's errors in one line."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from nvlm_trt.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True)  # refuses "8" and True where a number is expected

# pydantic's error types that concern a key and not its value
_KEY_FAULTS = {"missing": "missing", "unexpected_keyword_argument": "unknown key", "extra_forbidden": "unknown key"}


def first_error(error: ValidationError, keys: Mapping[str, str] | None = None) -> str:
    """Return pydantic's first error in one line: `limits.max_slots = 0: input should be greater than 0`.

    `keys` renames fields to the keys of the file that the reader of the message has to correct."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join((keys or {}).get(str(part), str(part)) for part in first["loc"])
    if fault := _KEY_FAULTS.get(first["type"]):
        return f"{where}: {fault}"
    fault = " ".join(first["msg"].split())
    fault = fault[:1].lower() + fault[1:]
    return f"{where} = {reprlib.repr(first['input'])}: {fault}" if where else fault


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckedFields:
    """Validates the fields of a frozen dataclass at every construction, also by `dataclasses.replace`.

    Subclasses need the same decorator. Raises ConfigError for a value of the wrong type or outside its bounds, an
    unknown field and a missing field."""

    PREFIX: ClassVar[str] = ""  # put before the field's name in an error
    KEYS: ClassVar[Mapping[str, str]] = {}  # field -> its key in the file, where the two differ
    REMEDY: ClassVar[str] = "correct config.json"

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, values: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            raise ConfigError(f"{cls.PREFIX}{first_error(error, cls.KEYS)}; {cls.REMEDY}") from None
