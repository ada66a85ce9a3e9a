"""Finds TensorRT-RTX, names the GPUs that plans are built for, and says which precisions a GPU lacks.

A plan runs on one version of TensorRT-RTX only, and on the GPUs among its targets. Without targets, plans run on
compute capability 8.0, 8.6, 8.9, 12.0 and 12.1, if the GPU has the plan's precisions (the support matrix of
TensorRT-RTX 1.5 and the header of the plans).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvlm_trt.backends.plans.gpu import MEANWHILE, import_torch
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import floating_type

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")  # the members of ComputeCapability
_DEFAULT = TARGETS[1:]  # of a plan without targets
INSTALL = "pip install 'nvlm-trt[tensorrt-rtx]'"

# precision -> the targets for which TensorRT-RTX 1.7.1 refuses to build it
_WITHOUT = {
    "fp32": ("sm75",),
    "bf16": ("sm75",),
    "fp8": ("sm75", "sm80", "sm86"),
    "int4-weight-only": ("sm75",),
}


def import_rtx() -> Any:
    """Import TensorRT-RTX's Python bindings. Raises EngineError, saying how to get them, if they are missing."""
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise EngineError(
            f"TensorRT-RTX cannot be imported ({error}); {INSTALL} (Linux and Windows, x86-64); {MEANWHILE}"
        ) from None
    return tensorrt_rtx_bindings


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Read `--target sm86,sm89`. Raises EngineError for a target that TensorRT-RTX does not have."""
    targets = tuple(part.strip().lower() for part in text.split(",")) if text is not None else ()
    for target in targets:
        if target not in TARGETS:
            raise EngineError(f"--target {target!r} is not one of {', '.join(TARGETS)}; separate targets by commas")
        if targets.count(target) > 1:
            raise EngineError(f"--target names {target} twice; name it once")
    return targets


def check_precisions(targets: Sequence[str], precisions: Mapping[str, str]) -> None:
    """Raise EngineError for a target that lacks a precision of the engine."""
    for precision in dict.fromkeys((*precisions.values(), floating_type(precisions))):
        lacking = [target for target in targets if target in _WITHOUT.get(precision, ())]
        if lacking:
            raise EngineError(
                f"--target {lacking[0]}: GPUs of compute capability {dotted(lacking[0])} have no {precision}; "
                "leave the target out, or choose another --precision"
            )


def dotted(target: str) -> str:
    """Return "8.9" for "sm89"."""
    number = target.removeprefix("sm")
    return f"{number[:-1]}.{number[-1]}"


def names_of(targets: Sequence[str]) -> str:
    """Return the compute capabilities of an engine's targets, for messages."""
    return ", ".join(map(dotted, targets)) or ", ".join(map(dotted, _DEFAULT))


def set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Set the targets of an IBuilderConfig."""
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)


def find_gpu(targets: Sequence[str]) -> str | None:
    """Return the name of the GPU of this machine if plans for `targets` run on it, else None."""
    try:
        torch = import_torch()
    except EngineError:
        return None
    major, minor = torch.cuda.get_device_capability()
    here = f"sm{major}{minor}"
    return str(torch.cuda.get_device_name()) if here in (targets or _DEFAULT) else None
