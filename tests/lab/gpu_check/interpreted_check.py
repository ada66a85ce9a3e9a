"""gpu_check's trials in the process where Triton interprets kernels, with what needs a GPU replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_check.record import Check, Record

SECONDS = 2e-5


def spoiled_attention() -> list[str]:
    """Statuses of `compare` when one block of keys is lost, a row is not zero, and when nothing is wrong."""
    import torch
    from gpu_check import attention

    shape = attention.Shape(4, 2, 64, 1, 6, 160)
    ranges = attention.random_ranges(shape)

    def losing_keys(inputs: attention.Inputs) -> torch.Tensor:
        return attention.launch(inputs._replace(cross_ranges=inputs.cross_ranges.clamp_max(144)))

    def not_zero(inputs: attention.Inputs) -> torch.Tensor:
        return attention.launch(inputs) + 1e-6 * attention.is_empty(inputs)

    launches = (losing_keys, not_zero, attention.launch)
    return [attention.compare(shape, ranges, torch.float32, "cpu", launch).status for launch in launches]


def timed_trials(path: str) -> list[Check]:
    """The trials that time, with small shapes on the CPU: every call is made once, and each "takes" SECONDS."""
    import torch
    from gpu_check import attention, attention_speed, measure, resample, tune
    from gpu_check.record import perform

    def gpu_seconds(calls: Sequence[Callable[[], object]], launches: int = 0) -> float:
        assert all(isinstance(call(), torch.Tensor) for call in calls[:1])
        return SECONDS

    def on_cpu(shape: Any, ranges: Any, dtype: torch.dtype, device: str) -> attention.Inputs:
        return attention.make_inputs(shape, ranges, torch.float16, "cpu")

    small = attention.Shape(4, 2, 64, 2, 1, 70)
    prompt = attention.Shape(4, 2, 64, 1, 20, 70)
    picture = resample.Picture(24, 16, 3, 2, tile=8)
    noise = resample.noise
    for module in (attention_speed, resample, tune):
        module.gpu_seconds = gpu_seconds
    attention_speed.make_inputs = on_cpu
    attention_speed.cold_copies = resample.cold_copies = lambda tensors: 2
    resample.noise = lambda picture, device: noise(picture, "cpu")
    real_ranges = attention.prompt_ranges
    for module in (attention_speed, tune):
        module.DECODE, module.PREFILL, module.DTYPE = small, prompt, torch.float16
        module.prompt_ranges = lambda shape: real_ranges(shape, before=2, tag=2)
    resample.LARGE = tune.LARGE = picture
    torch.cuda.synchronize = lambda: None

    record = Record(Path(path))
    for name, value in ((measure.COPY, 4000.0), (measure.MATMUL, 700.0)):
        record.add(Check(measure.CEILINGS, name, "measured", {name: value}))
    deadline = float("inf")
    perform("attention-speed", attention_speed.trials(record), record, deadline)
    times = [trial for trial in resample.trials("cuda", record) if trial[0].startswith("time")]
    perform("tile_resample", iter(times), record, deadline)
    chosen = [case for case in tune.cases() if case[0] != "tile_resample"][:2] + tune.cases()[-1:]
    tune.cases = lambda: chosen
    tune.compile_ahead = lambda cases, deadline: None
    perform("tune", tune.trials(deadline), record, deadline)
    print(*tune.best(record), sep="\n")
    return record.read()
