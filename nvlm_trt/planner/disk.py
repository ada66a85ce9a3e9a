"""Computes the disk space of a build before it writes anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nvlm_trt.backends.table import DEFAULT_BACKEND, find_backend
from nvlm_trt.errors import EngineError
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine


def disk_of_build(
    design: EngineDesign,
    *,
    calibrates: bool = False,
    tries_another: bool = False,
    unquantised: Mapping[str, str] | None = None,
) -> int:
    """Count the bytes of weights that a build of `design` has on the disk at once, at most; all else takes a few
    megabytes.

    The other arguments name the engines that the build writes beside its own: `calibrates`: one to measure a
    calibration with, in fp32; `tries_another`: one that is tried in place of its own; `unquantised`: that of the
    accuracy gate, in these precisions."""
    copies = 2 if design.backend.memory.graphs_first else 1
    own = _bytes_of(design)
    tried = 2 * own if tries_another else own
    peaks = [copies * own, tried]
    if unquantised is not None:
        plain = _bytes_of(design.with_precisions(unquantised))
        peaks.append(tried + (plain if tries_another else copies * plain))
    if calibrates:
        observing = replace(design, backend=find_backend(DEFAULT_BACKEND))
        peaks.append(_bytes_of(observing.with_precisions(dict.fromkeys(design.precisions, "fp32"))))
    return max(peaks)


def _bytes_of(design: EngineDesign) -> int:
    return sum(plan_engine(design).weights.values())


def check_disk(folder: Path, needed: int, present: int) -> None:
    """Raise EngineError if a folder that holds `present` of `needed` bytes has no space for the rest."""
    status = os.statvfs(folder)
    missing, free = needed - present, status.f_bavail * status.f_frsize
    if missing > free:
        raise EngineError(
            f"the disk of {folder.parent} has too little space: the build needs {missing} bytes, {free} are free; free "
            f"{(missing - free) / 1e9:.2f} GB there, or choose another --output"
        )
