"""The ONNX Runtime backend over observing graphs: it answers as ever, and adds up what every run reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from nvlm_trt.backends.base import COMPONENTS, FloatArray, IntArray, RangeArray
from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend
from nvlm_trt.builders.quantization.calibration import LinearInput
from nvlm_trt.builders.quantization.magnitudes import int8_clip
from nvlm_trt.builders.quantization.observer import CHANNELS, COUNTS
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.model.precision import component_of


class ObservingBackend(OnnxRuntimeBackend):
    """Opened on an engine whose layers have the format Observer."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, COMPONENTS, threads=None)
        self._reports = {component: _report_arrays(session) for component, session in self._sessions.items()}
        self._channels: dict[str, FloatArray] = {}
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self._cross_attends = False

    def __enter__(self) -> ObservingBackend:
        return self

    def linears(self) -> dict[str, LinearInput]:
        """What was seen so far, of the layers that were reached.

        Raises EngineError for a layer whose inputs were not finite, or zero throughout."""
        return {name: _linear_input(name, channels, self._counts[name]) for name, channels in self._channels.items()}

    def _run_cross_kv(self, image_tokens: FloatArray) -> list[FloatArray]:
        names = [output.name for output in self._session("cross_kv").get_outputs()]
        outputs = dict(zip(names, super()._run_cross_kv(image_tokens), strict=True))
        self._add_up({name: outputs.pop(name) for name in self._reports["cross_kv"]})
        return list(outputs.values())

    def _step(
        self,
        first_slot: int,
        input_ids: IntArray,
        positions: IntArray,
        image_tokens: FloatArray,
        cross_ranges: RangeArray,
    ) -> FloatArray:
        # the blocks of an observing graph run always; what they make of text alone is thrown away, and not looked at
        self._cross_attends = bool((cross_ranges[..., 0] < cross_ranges[..., 1]).any())
        return super()._step(first_slot, input_ids, positions, image_tokens, cross_ranges)

    def _run(self, component: str, binding: onnxruntime.IOBinding) -> None:
        reports = self._reports[component]
        for name, array in reports.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        super()._run(component, binding)
        self._add_up(reports)

    def _add_up(self, reports: Mapping[str, FloatArray]) -> None:
        for output, values in reports.items():
            if output.startswith(CHANNELS):
                name = output.removeprefix(CHANNELS)
                if self._is_used(name):
                    before = self._channels.get(name, np.zeros_like(values))
                    self._channels[name] = np.maximum(before, values)  # NaN stays NaN
            else:
                name = output.removeprefix(COUNTS)
                if self._is_used(name):
                    counts = values.astype(np.int64)
                    self._counts[name] = self._counts.get(name, np.zeros_like(counts)) + counts

    def _is_used(self, name: str) -> bool:
        in_block = component_of(name) == "cross_attention" and not name.endswith(("k_proj", "v_proj"))
        return self._cross_attends or not in_block


def _report_arrays(session: onnxruntime.InferenceSession) -> dict[str, npt.NDArray[Any]]:
    """Where a session's extra outputs are written."""
    outputs = session.get_outputs()
    return {
        output.name: np.zeros(output.shape, np.float32)
        for output in outputs
        if output.name.startswith((CHANNELS, COUNTS))
    }


def _linear_input(name: str, channels: FloatArray, counts: npt.NDArray[np.int64]) -> LinearInput:
    abs_max = float(channels.max())
    if not np.isfinite(abs_max):
        raise EngineError(f"calibration: the inputs of {name} are not finite; check the checkpoint's weights")
    if abs_max == 0:
        raise EngineError(
            f"calibration: the inputs of {name} are all zero, so they have no scale; build its component with fp32"
        )
    # 6 digits are more than any scale is good for, and keep the file small
    rounded = [float(f"{value:.6g}") for value in channels]
    return LinearInput(
        abs_max=max(rounded), clip=float(f"{min(int8_clip(counts, abs_max), max(rounded)):.6g}"), channels=rounded
    )
