"""Says how long each step of an engine takes: planned from a data sheet, or measured and read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvlm_trt import strict_json
from nvlm_trt.bounded_file import CONFIG_BYTES, read_bounded
from nvlm_trt.errors import EngineError
from nvlm_trt.planner.step_times import StepTimes
from nvlm_trt.validation import first_error

NotNegative = Field(ge=0, allow_inf_nan=False)


class Overlap(BaseModel):
    """Says how many times as long work takes while the vision encoder and the scheduler's steps run together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: float = Field(ge=1, allow_inf_nan=False)
    encode: float = Field(ge=1, allow_inf_nan=False)


class StepSeconds(Protocol):
    """Computes seconds. Arguments are those of `Roofline`."""

    @property
    def chunk_size(self) -> int: ...

    @property
    def overlap(self) -> Overlap: ...

    def encode(self, tiles: int) -> float: ...

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> float: ...

    def decode(self, sequences: int, tokens: float, cross_tokens: int) -> float: ...


class PlannedSteps:
    """Implements `StepSeconds` by a roofline. Encoder and steps share one device: together each takes twice as long."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self.chunk_size, self.overlap = times.chunk_size, Overlap(step=2, encode=2)

    def encode(self, tiles: int) -> float:
        return self._times.encode(tiles).seconds

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> float:
        return self._times.chunk(tokens, position, cross_tokens).seconds

    def decode(self, sequences: int, tokens: float, cross_tokens: int) -> float:
        return self._times.decode(sequences, round(tokens), cross_tokens).seconds


class Line(BaseModel):
    """Seconds that grow with a count: `base + slope * count`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: float = NotNegative
    slope: float = NotNegative

    def at(self, count: float) -> float:
        return self.base + self.slope * count


class MeasuredSteps(BaseModel):
    """Implements `StepSeconds` by lines through measurements of one engine on one machine.

    Cross-attended tokens change nothing: they are measured with as many as the simulated requests have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    machine: str
    chunk_size: int = Field(gt=0)
    encoder: Line  # of the tiles of an image
    prompt: Line  # of the tokens of a chunk
    cached: float = NotNegative  # seconds more for each token of a chunk and each token cached before it
    token: Mapping[int, Line]  # sequences decoded together -> of the tokens cached in each
    overlap: Overlap

    def encode(self, tiles: int) -> float:
        return self.encoder.at(tiles)

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> float:
        return self.prompt.at(tokens) + self.cached * tokens * position

    def decode(self, sequences: int, tokens: float, cross_tokens: int) -> float:
        """Interpolate between the measured numbers of sequences; beyond the largest, go on in a straight line."""
        counts = sorted(self.token)
        seconds = [self.token[count].at(tokens) for count in counts]
        if sequences > counts[-1]:
            return seconds[-1] * sequences / counts[-1]
        return float(np.interp(sequences, counts, seconds))


def read_steps(path: Path) -> MeasuredSteps:
    """Read measured times. Raises EngineError for a file that is not one of them."""
    remedy = "write it with `python -m lab.fleet_simulation`"
    try:
        steps = MeasuredSteps.model_validate(strict_json.loads(read_bounded(path, CONFIG_BYTES)))
    except OSError as error:
        raise EngineError(f"cannot read the step times {path} ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        raise EngineError(f"step times {path}: {first_error(error)}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"step times {path} are not JSON ({error}); {remedy}") from None
    if not steps.token or min(steps.token) < 1:
        raise EngineError(f"step times {path}: token has no times of 1 or more sequences; {remedy}")
    return steps
