"""pydantic's errors in one line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvlm_trt.validation import first_error


class Part(BaseModel):
    size: int = Field(gt=0, strict=True)


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    parts: list[Part]
    name: str = ""


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"parts": [{"size": 1}, {"size": 0}]}, "parts.1.size = 0: input should be greater than 0"),
        ({"parts": [{"size": "8"}]}, "parts.0.size = '8': input should be a valid integer"),
        ({}, "parts: missing"),
        ({"parts": [], "colour": 1}, "colour: unknown key"),
        ([], "input should be a valid dictionary or instance of Whole"),
    ],
)
def test_the_first_error_in_one_line(value: Any, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(value)
    assert first_error(caught.value) == line


def test_fields_have_the_names_that_the_file_uses() -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({"parts": [{"size": 0}]})
    assert first_error(caught.value, {"parts": "sections"}) == "sections.0.size = 0: input should be greater than 0"


def test_a_long_value_is_cut_and_line_breaks_stay_out() -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({"parts": "many\nlines\n" * 1000})
    assert len(first_error(caught.value)) < 120
    assert "\n" not in first_error(caught.value)
