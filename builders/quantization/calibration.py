"""calibration.json: what the inputs of a checkpoint's linear layers were seen to hold, from which static scales follow.

It belongs to a checkpoint, not to a precision: one file serves every `--precision` and SmoothQuant's every alpha.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvlm_trt.engine import CALIBRATION
from nvlm_trt.errors import EngineError

KIND: Final = "nvlm-trt calibration"
SCHEMA_VERSION: Final = 1
_MARK = f'"kind": "{KIND}"'.encode()
_HEAD_BYTES = 256  # `kind` is the first key that `save` writes
_REMEDY = "calibrate again with --calibration SAMPLES.jsonl"

_Magnitude = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LinearInput(_Record):
    """The magnitudes of one linear layer's input."""

    abs_max: _Magnitude  # the largest
    clip: _Magnitude  # where 8 integer bits of least squared error saturate, at most abs_max
    channels: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]  # the largest of each input channel


class Calibration(_Record):
    """`linears` by the name of the layer: that of its weight without ".weight"."""

    kind: Literal["nvlm-trt calibration"] = KIND
    schema_version: Literal[1] = SCHEMA_VERSION
    checkpoint_digest: str
    samples: dict[str, Any]  # count and digest of the set
    linears: dict[str, LinearInput]

    def of(self, weight: str, inputs: int) -> LinearInput:
        """By the weight's name and its inputs. Raises EngineError for a layer that was never observed."""
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
        """Raises EngineError if this was measured on other weights."""
        if self.checkpoint_digest != digest:
            raise EngineError(
                f"{source} was measured on another checkpoint (digest {self.checkpoint_digest[:12]}, this one has "
                f"{digest[:12]}); {_REMEDY}"
            )

    def save(self, path: Path) -> None:
        """A line per layer, so that two files can be compared by eye."""
        head = self.model_dump(exclude={"linears"})
        lines = [f"{json.dumps(name)}: {linear.model_dump_json()}" for name, linear in self.linears.items()]
        text = json.dumps(head)[:-1] + ', "linears": {\n' + ",\n".join(lines) + "\n}}\n"
        path.write_text(text, encoding="utf-8")


def is_calibration(path: Path) -> bool:
    """Whether a file is a saved calibration; anything else that can be read is taken for samples."""
    try:
        with path.open("rb") as file:
            return _MARK in file.read(_HEAD_BYTES)
    except OSError as error:
        raise EngineError(
            f"cannot read calibration {os.fspath(path)} ({error.strerror}); name a JSONL file of samples or a saved "
            f"{CALIBRATION}"
        ) from None


def read_calibration(path: Path) -> Calibration:
    """Raises EngineError for a file that is cut, of another version, or holds scales that cannot be."""
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EngineError(f"cannot read calibration {path} ({error.strerror}); {_REMEDY}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EngineError(f"{path}: {where + ': ' if where else ''}{first['msg']}; {_REMEDY}") from None
