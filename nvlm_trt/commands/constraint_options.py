"""Reads the options of `nvlm-trt ask` that say what the answer must be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvlm_trt.errors import NvlmError

if TYPE_CHECKING:
    from nvlm_trt.constraint import Constraint

_NEEDS = "needs the extra `structured` where the engine runs"
JsonSchemaOption = Annotated[
    Path | None, typer.Option(help=f"The answer is JSON that fits the JSON schema in this file; {_NEEDS}.")
]
RegexOption = Annotated[str | None, typer.Option(help="The whole answer matches this regular expression.")]
ChoiceOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="The answer is this text, or another one; repeat for each.")
]


def constraint_of(json_schema: Path | None, regex: str | None, choice: Sequence[str] | None) -> Constraint | None:
    """Return the constraint that the options ask for. Raises NvlmError for several, and for a file without a schema."""
    from nvlm_trt.constraint import Constraint

    given = {"--json-schema": json_schema is not None, "--regex": regex is not None, "--choice": bool(choice)}
    if sum(given.values()) > 1:
        named = " and ".join(option for option, is_given in given.items() if is_given)
        raise NvlmError(f"{named} both say what the answer must be; pass one of them")
    if json_schema is not None:
        return Constraint(json_schema=_read_schema(json_schema))
    if regex is not None:
        return Constraint(regex=regex)
    return Constraint(choice=tuple(choice)) if choice else None


def _read_schema(path: Path) -> object:
    from nvlm_trt import strict_json
    from nvlm_trt.bounded_file import read_bounded
    from nvlm_trt.constraint import MAX_BYTES

    try:
        return strict_json.loads(read_bounded(path, MAX_BYTES))
    except OSError as error:
        raise NvlmError(f"cannot read {path} ({error.strerror}); name a file with a JSON schema") from None
    except (ValueError, RecursionError) as error:
        raise NvlmError(f"{path} is not JSON ({error}); write a JSON schema into it") from None
