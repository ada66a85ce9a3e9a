"""gpu_check's trials in the process where Triton interprets kernels; calls that need a GPU are replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.gpu_check.record import Check, Record

SECONDS = 2e-5


def spoiled_attention() -> list[str]:
    """Returns the statuses of `compare` for a lost block of keys, for a row that is not zero, and for the kernel."""
    import torch

    from lab.gpu_check import attention

    shape = attention.Shape(4, 2, 64, 1, 6, 160)
    ranges = attention.random_ranges(shape)

    def losing_keys(inputs: attention.Inputs) -> torch.Tensor:
        return attention.launch(inputs._replace(cross_ranges=inputs.cross_ranges.clamp_max(144)))

    def not_zero(inputs: attention.Inputs) -> torch.Tensor:
        return attention.launch(inputs) + 1e-6 * attention.is_empty(inputs)

    launches = (losing_keys, not_zero, attention.launch)
    return [attention.compare(shape, ranges, torch.float32, "cpu", launch).status for launch in launches]


def timed_trials(path: str) -> list[Check]:
    """Runs the trials that time, with small shapes on the CPU: makes every call once, and each "takes" SECONDS."""
    import torch

    from lab.gpu_check import attention, attention_speed, resample, tune

    def gpu_seconds(calls: Sequence[Callable[[], object]], launches: int = 0) -> float:
        assert all(isinstance(call(), torch.Tensor) for call in calls[:1])
        return SECONDS

    def on_cpu(shape: Any, ranges: Any, dtype: torch.dtype, device: str) -> attention.Inputs:
        return attention.make_inputs(shape, ranges, torch.float16, "cpu")

    small = attention.Shape(4, 2, 64, 2, 1, 70)
    prompt = attention.Shape(4, 2, 64, 1, 20, 70)
    image = resample.TiledImage(24, 16, 3, 2, tile=8)
    noise, real_ranges, real_cases = resample.noise, attention.prompt_ranges, tune.cases
    chosen = [case for case in real_cases() if case[0] != "tile_resample"][:2] + real_cases()[-1:]
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention_speed, resample, tune):
            patch.setattr(module, "gpu_seconds", gpu_seconds)
        patch.setattr(attention_speed, "make_inputs", on_cpu)
        for module in (attention_speed, resample):
            patch.setattr(module, "cold_copies", lambda tensors: 2)
        patch.setattr(resample, "noise", lambda tiling, device: noise(tiling, "cpu"))
        for module in (attention_speed, tune):
            for name, value in (("DECODE", small), ("PREFILL", prompt), ("DTYPE", torch.float16)):
                patch.setattr(module, name, value)
            patch.setattr(module, "prompt_ranges", lambda shape: real_ranges(shape, before=2, tag=2))
        for module in (resample, tune):
            patch.setattr(module, "LARGE", image)
        patch.setattr(tune, "cases", lambda: chosen)
        patch.setattr(tune, "compile_ahead", lambda cases, deadline: None)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        return performed(Path(path))


def performed(path: Path) -> list[Check]:
    """Runs the trials that time, after made-up ceilings."""
    from lab.gpu_check import attention_speed, measure, resample, tune
    from lab.gpu_check.record import perform

    record = Record(path)
    for ceiling, number in ((measure.COPY, 4000.0), (measure.MATMUL, 700.0)):
        record.add(Check(measure.CEILINGS, ceiling, "measured", {ceiling: number}))
    deadline = float("inf")
    perform("attention-speed", attention_speed.trials(record), record, deadline)
    times = [trial for trial in resample.trials("cuda", record) if trial[0].startswith("time")]
    perform("tile_resample", iter(times), record, deadline)
    perform("tune", tune.trials(deadline), record, deadline)
    print(*tune.best(record), sep="\n")
    return record.read()
