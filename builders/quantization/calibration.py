"""Reads and writes calibration.json: the magnitudes observed at the inputs of linear layers, for static scales.

A calibration belongs to a checkpoint, not to a precision: one file serves every `--precision` and every alpha of
SmoothQuant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvlm_trt.bounded_file import CALIBRATION_BYTES, open_regular, read_bounded
from nvlm_trt.engine import CALIBRATION
from nvlm_trt.errors import EngineError

KIND: Final = "nvlm-trt calibration"
SCHEMA_VERSION: Final = 1
SOURCE_SCALES: Final = {"source": "input scales of the checkpoint"}  # in the place of samples
_MARK = f'"kind": "{KIND}"'.encode()
_HEAD_BYTES = 256  # `kind` is the first key that `save` writes
_REMEDY = "calibrate again with --calibration SAMPLES.jsonl"

_Magnitude = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LinearInput(_Record):
    """Holds the magnitudes of one linear layer's input."""

    abs_max: _Magnitude  # the largest magnitude
    clip: _Magnitude  # where 8-bit integers saturate with the least squared error; at most abs_max
    channels: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]  # the largest in each input channel


class LinearInputs(Protocol):
    """Finds the magnitudes of a linear layer's input. `Calibration` implements this protocol."""

    def of(self, weight: str, inputs: int) -> LinearInput: ...


class Calibration(_Record):
    """Holds the magnitudes of all layers. A key of `linears` is the name of a layer's weight without ".weight"."""

    kind: Literal["nvlm-trt calibration"] = KIND
    schema_version: Literal[1] = SCHEMA_VERSION
    checkpoint_digest: str
    samples: dict[str, Any]  # count and digest of the sample set
    linears: dict[str, LinearInput]

    def of(self, weight: str, inputs: int) -> LinearInput:
        """Return the record of a weight with `inputs` columns. Raises EngineError if no sample reached the layer."""
        name = weight.removesuffix(".weight")
        if name not in self.linears:
            raise EngineError(
                f"the calibration lacks the linear layer {name}, which its samples never reached; {_REMEDY} of "
                "questions about images"
            )
        linear = self.linears[name]
        if len(linear.channels) != inputs:
            raise EngineError(
                f"the calibration of {name} has {len(linear.channels)} channels, the layer has {inputs}; {_REMEDY}"
            )
        return linear

    def check_checkpoint(self, digest: str, source: Path) -> None:
        """Raise EngineError if this calibration was measured on other weights."""
        if self.checkpoint_digest != digest:
            raise EngineError(
                f"{source} was measured on another checkpoint (digest {self.checkpoint_digest[:12]}, this one has "
                f"{digest[:12]}); {_REMEDY}"
            )

    def save(self, path: Path) -> None:
        """Write one line per layer, so that a person can compare two files."""
        head = self.model_dump(exclude={"linears"})
        lines = [
            f"{json.dumps(name, allow_nan=False)}: {linear.model_dump_json()}" for name, linear in self.linears.items()
        ]
        text = json.dumps(head, allow_nan=False)[:-1] + ', "linears": {\n' + ",\n".join(lines) + "\n}}\n"
        path.write_text(text, encoding="utf-8")


def is_calibration(path: Path) -> bool:
    """Tell whether a file is a saved calibration. Callers read any other file as samples.

    Raises EngineError for a file that cannot be read."""
    try:
        with open_regular(path) as file:
            return _MARK in file.read(_HEAD_BYTES)
    except OSError as error:
        raise EngineError(
            f"cannot read calibration {os.fspath(path)} ({error.strerror}); name a JSONL file of samples or a saved "
            f"{CALIBRATION}"
        ) from None


def read_calibration(path: Path) -> Calibration:
    """Read a saved calibration. Raises EngineError for an incomplete file, another version or impossible scales."""
    try:
        return Calibration.model_validate_json(read_bounded(path, CALIBRATION_BYTES))
    except OSError as error:
        raise EngineError(f"cannot read calibration {path} ({error.strerror}); {_REMEDY}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EngineError(f"{path}: {where + ': ' if where else ''}{first['msg']}; {_REMEDY}") from None
