"""What the tests of the TensorRT engine run in the process that has TensorRT's bindings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_on_cpu import Machine

from nvlm_trt.backends import open_backend
from nvlm_trt.builders import tensorrt_engine, tensorrt_profiles
from nvlm_trt.builders.tensorrt_engine import build_tensorrt_engine
from nvlm_trt.builders.tensorrt_plan import PlanOptions
from nvlm_trt.engine import Engine
from nvlm_trt.plugins.gated_cross_attention.blocks import HEAD_DIMS

LIMITS = {"max_slots": 3, "max_seq_len": 256}


def build(checkpoint: Path, output: Path, **options: Any) -> list[str]:
    """Build in fp32; what happened, in order."""
    machine = Machine()
    with machine.patched(output.parent / "cache"):
        build_tensorrt_engine(checkpoint, output, LIMITS, precision="fp32", options=PlanOptions(**options))
    return machine.events


def build_with_the_plugins_heads(checkpoint: Path, output: Path) -> None:
    with Machine().patched(output.parent / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_engine, "HEAD_DIMS", HEAD_DIMS)
        build_tensorrt_engine(checkpoint, output, LIMITS, precision="fp32")


def fail_to_build(checkpoint: Path, output: Path, code: str, text: str) -> None:
    machine = Machine()
    machine.refuse_to_build = code, text
    with machine.patched(output.parent / "cache"):
        build_tensorrt_engine(checkpoint, output, LIMITS, precision="fp32")


def ask(checkpoint: Path, output: Path, steps: dict[str, Any]) -> dict[str, np.ndarray]:
    """Build with chunks of 16 tokens and run `steps` through the backend."""
    with Machine().patched(output.parent / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_profiles, "_LARGEST_CHUNK", 16)
        build_tensorrt_engine(checkpoint, output, LIMITS, precision="fp32")
        return run_steps(Engine.open(output), steps)


def run_steps(engine: Engine, steps: dict[str, Any]) -> dict[str, np.ndarray]:
    """Prefill three slots, decode them twice as one batch, move a slot, decode two."""
    answers: dict[str, np.ndarray] = {}
    with open_backend(engine) as backend:
        hidden = backend.config.llm.hidden_size
        tokens = answers["image tokens"] = backend.encode(steps["pixels"])
        if backend.config.cross_layers:
            cross_kv = answers["cross kv"] = backend.cross_kv(tokens)
            backend.write_cross_kv(1, 0, cross_kv)
        for slot, prompt in enumerate(steps["prompts"]):
            images = tokens.reshape(-1, hidden)[: int((prompt == backend.config.image_token_id).sum())]
            ranges = steps["ranges"][slot]
            answers[f"prefill {slot}"] = backend.prefill(slot, 0, prompt, images, ranges)
        lengths = np.array([len(prompt) for prompt in steps["prompts"]])
        last = np.stack([ranges[-1] for ranges in steps["ranges"]])
        for i in range(2):
            answers[f"decode {i}"] = backend.decode(steps["next"], lengths + i, last).copy()
        backend.move_slot(2, 0, int(lengths[2]) + 2, 0)
        moved = np.array([lengths[2], lengths[1]]) + 2
        answers["moved"] = backend.decode(steps["next"][[2, 1]], moved, last[[2, 1]]).copy()
    return answers
