"""Loads TensorRT's plans: checks what they were built for, takes stripped weights from ONNX files, streams weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvlm_trt.backends.plans.gpu import import_torch
from nvlm_trt.backends.plans.runtime import deserialise
from nvlm_trt.backends.tensorrt.record import record_of
from nvlm_trt.backends.tensorrt.target import check_target, find_target, import_tensorrt
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError


class TensorRtRuntime:
    """Implements `PlanRuntime` for one engine."""

    def __init__(self, engine: Engine, device: str) -> None:
        """Raises EngineError without TensorRT or a GPU, and for an engine of another TensorRT version or GPU."""
        check_target(engine, find_target(device))
        self.trt, self.torch = import_tensorrt(), import_torch()
        self._record = record_of(engine)
        self._logger = self.trt.Logger(self.trt.Logger.ERROR)
        self._runtime = self.trt.Runtime(self._logger)

    def load(self, plan: Path) -> Any:
        """Load `plan`; a stripped plan takes its weights from the ONNX file beside it."""
        engine = deserialise(self._runtime, plan)
        if self._record.stripped:
            self._refit(engine, plan)
        if self._record.weight_streaming:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def create_context(self, engine: Any) -> Any | None:
        return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def can_capture(self, context: Any, stream: Any) -> bool:
        return True  # the linter has refused graphs that cannot be recorded

    def close(self) -> None: ...

    def _refit(self, engine: Any, plan: Path) -> None:
        weights = plan.with_suffix(".onnx")
        refitter = self.trt.Refitter(engine, self._logger)
        parser = self.trt.OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
            reason = (
                parser.get_error(0).desc() if parser.num_errors else f"{len(refitter.get_missing_weights())} missing"
            )
            raise EngineError(f"engine file {plan} cannot take its weights from {weights} ({reason}); rebuild it")
