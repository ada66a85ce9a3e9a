"""gpu_check's small plans for TensorRT-RTX, built for real and computed by torch, and how it compares numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'nvlm-trt[tensorrt-rtx]'")
pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")

from lab.gpu_check import attention, rtx_engines, rtx_kernels, rtx_numbers, rtx_plans
from lab.gpu_check.record import MEASURED, PASSED, WRONG, NotAvailableError
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.engine import Engine

MODEL, PRECISION = "nvlm-h-tiny", "bf16"


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_another_engine_of_the_checkpoint_gives_the_numbers(engines: Path, tmp_path: Path) -> None:
    """ONNX Runtime's own graphs, in float32 and with other attention operators, are within bf16's tolerance."""
    with np.load(rtx_engines.numbers_path(engines, MODEL, PRECISION)) as saved:
        given = dict(saved)
    checkpoint = rtx_engines.ROOT / "checkpoints" / MODEL
    build_engine(checkpoint, tmp_path / "engine", rtx_numbers.LIMITS, smoke_test=False, precision="fp32")
    with open_backend(Engine.open(tmp_path / "engine")) as backend:
        found = rtx_numbers.run_steps(backend, given)
    result = rtx_numbers.compare(found, given, PRECISION)
    assert result.status == PASSED
    assert result.values["same next token"] == "10 of 10"
    assert result.note == "limits 0.02, 0.02, 0.01, -"


def numbers(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"image_tokens.0": (2, 4, 8), "cross_kv.0": (1, 2, 2, 4, 8), "prefill.0.0": (32,), "prefill.0.9": (32,)}
    shapes |= {f"decode.{step}": (3, 32) for step in range(3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("precision", rtx_numbers.TOLERANCES)
def test_tolerances(precision: str) -> None:
    limits, expected = rtx_numbers.TOLERANCES[precision], numbers(0)

    def changed(kinds: tuple[str, ...], share: float) -> str:
        found = {name: array.copy() for name, array in expected.items()}
        for name, array in found.items():
            if name.startswith(kinds):
                rows = array.reshape(-1, array.shape[-1]) if array.ndim <= 2 else array.reshape(1, -1)
                rows[:, 0] += share * np.abs(rows).max(-1)
        return rtx_numbers.compare(found, expected, precision).status

    for kind, limit in zip(("image_tokens", "cross_kv", ("prefill", "decode")), limits, strict=False):
        kinds = (kind,) if isinstance(kind, str) else kind
        assert limit is not None
        assert (changed(kinds, 0.9 * limit), changed(kinds, 1.2 * limit)) == (PASSED, WRONG)
    assert changed(("decode.2",), 0.9) == (PASSED if limits.worst is None else WRONG)
    assert rtx_numbers.compare({**expected, "decode.1": expected["decode.1"][:2]}, expected, precision).status == WRONG
    nan = {name: np.full_like(array, np.nan) for name, array in expected.items()}
    assert rtx_numbers.compare(nan, expected, precision).status == WRONG


def test_what_no_model_without_cross_attention_has() -> None:
    expected = {name: array for name, array in numbers(1).items() if not name.startswith("cross_kv")}
    result = rtx_numbers.compare(expected, expected, "fp32")
    assert (result.status, result.values["cross K/V"]) == (PASSED, None)


# --- small plans, built for real -------------------------------------------------------------------------------------


def test_small_plans_build(engines: Path) -> None:
    for kind in ("bf16", "int8"):
        plan = rtx_plans.build(rtx_plans.parse(rtx_plans.product_graph(kind, 64)), ("sm80",))
        assert plan[:4] == b"vtrt"
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    for form in ("constant", "convolution"):
        assert rtx_kernels.refittable(form, weight) != rtx_kernels.refittable(form, None)
    profile = rtx_kernels.attention_profile()
    graph = rtx_engines.attention_path(engines).read_bytes()
    assert rtx_plans.build(rtx_plans.parse(graph), profile=profile)[:4] == b"vtrt"


def test_a_plan_that_is_not_built_says_why() -> None:
    graph = rtx_plans.product_graph("bf16", 64).replace(b"MatMul", b"MatMud")
    with pytest.raises(rtx_plans.NotBuiltError, match="Plugin not found"):
        rtx_plans.build(rtx_plans.parse(graph))
    with pytest.raises(NotAvailableError, match="does not build it"):
        rtx_kernels.build_or_tell(lambda: rtx_plans.build(rtx_plans.parse(graph)))


def test_a_malformed_plan_is_invalid() -> None:
    found = rtx_plans.validity(b"x" * 64)
    assert found.refused
    assert str(found) == "invalid; malformed engine"


class TorchPlan:
    """Computes in torch what the small plans compute, on the CPU, instead of `SmallPlan`."""

    spoiled = 0.0

    def __init__(self, plan: bytes) -> None:
        self.trt, self.logger, self.engine = None, None, None

    def is_capturable(self) -> bool:
        return True

    def call(self, tensors: dict[str, torch.Tensor]) -> Any:
        def run() -> None:
            if "query" in tensors:
                inputs = attention.Inputs(*(tensors[name] for name in attention.Inputs._fields))
                tensors["output"].copy_(attention.torch_attention(inputs) + self.spoiled)
                return
            x = tensors["x"]
            weight = torch.from_numpy(rtx_plans.integers(len(x))).double() * rtx_kernels.SCALE
            tensors["y"].copy_(x.double() @ weight + self.spoiled)

        return run


@pytest.fixture
def torch_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx_kernels, "SmallPlan", TorchPlan)
    monkeypatch.setattr(rtx_kernels, "require_gpu", lambda: None)
    monkeypatch.setattr(rtx_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(rtx_kernels, "LARGE", 128)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(rtx_kernels, "gpu_seconds", lambda calls: [call() for call in calls] and 2e-5)
    monkeypatch.setattr(rtx_kernels, "cold_copies", lambda tensors: 2)


def test_products(torch_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rtx_kernels.small_product(()).status == PASSED
    result = rtx_kernels.int8_product(())
    assert (result.status, result.values["times as fast"]) == (MEASURED, 1)
    assert result.note == "no faster than bf16: not multiplied as int8"
    monkeypatch.setattr(TorchPlan, "spoiled", 0.1)
    assert rtx_kernels.small_product(()).status == WRONG
    assert rtx_kernels.int8_product(()).status == WRONG


def test_masked_attention(torch_plans: None, engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "launch", attention.torch_attention)
    small = tuple(attention.Shape(4, 2, 64, batch=rows, tokens=1, cross_tokens=70) for rows in (1, 8))
    monkeypatch.setattr(rtx_kernels, "CROSS", small)
    monkeypatch.setattr(rtx_kernels, "build", lambda *_: b"")
    result = rtx_kernels.masked_attention(engines, 8, ())
    assert (result.status, result.values["times the kernel"]) == (MEASURED, 1)
    monkeypatch.setattr(TorchPlan, "spoiled", 0.1)
    assert rtx_kernels.masked_attention(engines, 1, ()).status == WRONG
