"""Functions that the tests of the TensorRT engine run in the process that has TensorRT's bindings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_steps import run_steps
from tensorrt_on_cpu import Machine

from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.tensorrt import build as tensorrt_engine
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.gate import AccuracyError, ComponentCost, GateOptions
from nvlm_trt.engine import Engine

LIMITS = {"max_slots": 3, "max_seq_len": 256}


def build(checkpoint: Path, output: Path, **options: Any) -> list[str]:
    """Build in fp32. Returns the events in order."""
    machine = Machine()
    with machine.patched(output.parent / "cache"):
        build_engine(checkpoint, output, LIMITS, precision="fp32", options=options, backend="tensorrt")
    return machine.events


def build_with_limits(checkpoint: Path, output: Path, limits: dict[str, int], precision: str) -> None:
    with Machine().patched(output.parent / "cache"):
        build_engine(checkpoint, output, limits, precision=precision, backend="tensorrt")


def ask_with_a_plugin_of_wider_heads(checkpoint: Path, output: Path, steps: dict[str, Any]) -> dict[str, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_engine, "HEAD_DIMS", (64, 128))
        return ask(checkpoint, output, steps)


def fail_to_build(checkpoint: Path, output: Path, text: str) -> None:
    machine = Machine()
    machine.refuse_to_build = text
    with machine.patched(output.parent / "cache"):
        build_engine(checkpoint, output, LIMITS, precision="fp32", backend="tensorrt")


def fail_to_allocate(checkpoint: Path, output: Path) -> None:
    def zeros(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("of paper")

    with Machine().patched(output.parent / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        build_engine(checkpoint, output, LIMITS, precision="fp32", backend="tensorrt")


def cache_bytes(checkpoint: Path, output: Path) -> dict[str, int]:
    """Build in fp32. Returns the bytes of each cache that the backend allocates, by name."""
    with Machine().patched(output.parent / "cache"):
        build_engine(checkpoint, output, LIMITS, precision="fp32", backend="tensorrt")
        with open_backend(Engine.open(output), ["decoder"]) as backend:
            return {name: cache.nbytes for name, cache in backend._cache.items()}  # type: ignore[attr-defined]


def build_quantised(checkpoint: Path, output: Path, precision: str, calibration: Path, gate: GateOptions) -> list[str]:
    """Build and measure. Returns the events in order."""
    machine = Machine()
    quantization = QuantizationOptions(calibration=calibration, smoothquant_alpha=0, gate=gate)
    with machine.patched(output.parent / "cache"):
        build_engine(checkpoint, output, LIMITS, precision=precision, quantization=quantization, backend="tensorrt")
    return machine.events


def refusal(*arguments: Any) -> tuple[str, list[ComponentCost]]:
    """Return the gate's message for a build that it refuses; the exception itself cannot be sent to another process."""
    with pytest.raises(AccuracyError) as caught:
        build_quantised(*arguments)
    return str(caught.value), list(caught.value.costs)


def ask(checkpoint: Path, output: Path, steps: dict[str, Any]) -> dict[str, np.ndarray]:
    """Build with chunks of 16 tokens and run `steps` through the backend."""
    with Machine().patched(output.parent / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_engine, "PREFILL_CHUNK", 16)
        build_engine(checkpoint, output, LIMITS, precision="fp32", backend="tensorrt")
        return run_steps(Engine.open(output), steps)


def ask_with_tokens_on_the_device(checkpoint: Path, output: Path, pixels: np.ndarray) -> list[str]:
    """Build, then check that image tokens from outside, as an array and by DLPack, give the same features and logits,
    bit for bit, and that the features stay on the device. Returns the events."""
    machine = Machine()
    with machine.patched(output.parent / "cache"):
        build_engine(checkpoint, output, LIMITS, precision="fp32", backend="tensorrt")
        with open_backend(Engine.open(output)) as backend:
            array = backend.to_host(backend.encode(pixels))
            lent = torch.from_numpy(array.copy())
            machine.events.append("import")
            imported = [backend.import_tokens(array), backend.import_tokens(lent)]
            lent.zero_()  # the owner uses the memory again
            prompt = np.full(3, backend.config.image_token_id)
            results = []
            for tokens in imported:
                features = backend.features(tokens)
                assert isinstance(features.embeddings, torch.Tensor)
                cross_kv: Any = features.cross_kv
                assert cross_kv is None or isinstance(cross_kv, torch.Tensor)
                images = backend.embeddings([features], 0, 3) if len(features.embeddings) >= 3 else None
                if images is not None:
                    logits = backend.prefill(0, 0, prompt, images, np.zeros((3, 2), np.int32))
                    results.append((np.zeros(1) if cross_kv is None else cross_kv.numpy(), logits))
                else:
                    results.append((cross_kv.numpy(), np.zeros(1)))
            for from_array, from_device in zip(*results, strict=True):
                np.testing.assert_array_equal(from_array, from_device)
    return machine.events
