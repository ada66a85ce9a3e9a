"""Compares arrays and tokens of an engine with those of the reference: a row per stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class StageComparison:
    """Holds one row of a report. A value on either side that is not finite makes `max_abs_diff` infinite."""

    name: str
    shape: str
    max_abs_diff: float | None
    cosine: str
    passed: bool

    @property
    def difference(self) -> str:
        return "" if self.max_abs_diff is None else f"{self.max_abs_diff:.2e}"


@dataclass
class ParityReport:
    title: str
    tolerance: float
    stages: list[StageComparison] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.stages) and all(stage.passed for stage in self.stages)

    def compare(
        self, name: str, actual: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float | None = None
    ) -> None:
        """Adds a row: passed if shapes are equal, all values finite, and no difference is above `tolerance`, by default
        the report's."""
        a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        comparable = actual.shape == expected.shape and bool(np.isfinite(a).all() and np.isfinite(b).all())
        difference = float(np.abs(a - b).max(initial=0.0)) if comparable else float("inf")
        cosine = f"{a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30):.8f}" if comparable else "-"
        shape = "x".join(map(str, actual.shape))
        allowed = self.tolerance if tolerance is None else tolerance
        self.stages.append(StageComparison(name, shape, difference, cosine, difference <= allowed))

    def compare_tokens(self, name: str, actual: list[int], expected: list[int]) -> None:
        equal = sum(a == b for a, b in zip(actual, expected, strict=False))
        passed = actual == expected and bool(expected)
        self.stages.append(StageComparison(name, f"{equal} of {len(expected)}", None, "", passed))

    def to_dict(self) -> dict[str, Any]:
        stages = [
            {
                "name": s.name,
                "shape": s.shape,
                "max_abs_diff": _finite(s.max_abs_diff),
                "cosine": s.cosine,
                "passed": s.passed,
            }
            for s in self.stages
        ]
        return {"passed": self.passed, "tolerance": _finite(self.tolerance), "stages": stages}


def _finite(value: float | None) -> float | None:
    """Return None for infinity, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None
