"""Opens sessions of ONNX Runtime on the CPU, with their options, bindings by pointer, and errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime
from onnxruntime import InferenceSession, IOBinding, SessionOptions
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors

from nvlm_trt.backends.onnxruntime import cpu
from nvlm_trt.bounded_file import GRAPH_BYTES, read_bounded
from nvlm_trt.errors import EngineError

RUNTIME_ERRORS = (
    runtime_errors.EPFail,
    runtime_errors.Fail,
    runtime_errors.InvalidArgument,
    runtime_errors.InvalidGraph,
    runtime_errors.InvalidProtobuf,
    runtime_errors.NoModel,
    runtime_errors.NoSuchFile,
    runtime_errors.NotImplemented,
    runtime_errors.RuntimeException,
    RuntimeError,
)

# A thread without work spins for this time before it sleeps: longer than the gap between two operators. Unbounded
# spinning takes cores from other processes: beside a busy process, a decoding step took 1.7 times as long.
_SPIN_US = 100
_CAN_BOUND_SPINNING = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 32)


def session_options(threads: int | None) -> SessionOptions:
    """Return the options of every session. `threads` None: one per core that this process may use."""
    options = SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if _CAN_BOUND_SPINNING else "0")
    if _CAN_BOUND_SPINNING:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.log_severity_level = 3
    # products with blocked DequantizeLinear stay in float32; by default, their inputs are rounded to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if cpu.saturates():  # with VNNI the option would cost time and change no number
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def open_session(path: Path, options: SessionOptions) -> InferenceSession:
    """Open a stage's ONNX file. Raises EngineError for a file that cannot be loaded."""
    return _session(_model(path, options), path, options)


def open_model(model: bytes, path: Path, options: SessionOptions) -> InferenceSession:
    """Open a graph whose weights are in the data file of the stage `path`. Raises EngineError if it cannot be
    loaded."""
    _find_weights(path, options)
    return _session(model, path, options)


def _session(model: str | bytes, path: Path, options: SessionOptions) -> InferenceSession:
    try:
        return InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise EngineError(
            f"engine file {path} cannot be loaded ({first_line(error)}); rebuild the engine with `nvlm-trt build`"
        ) from error


def _model(path: Path, options: SessionOptions) -> str | bytes:
    """Return the name of the file, or its graph rewritten for this CPU; `options` then get the folder of the weights.

    Raises EngineError if the graph must be rewritten and onnx is not installed."""
    if not _needs_rewriting(path):
        return str(path)
    try:
        from nvlm_trt.backends.onnxruntime.cpu_graph import rewritten
    except ImportError as error:
        raise EngineError(
            f"engine file {path} is quantised for CPUs with VNNI and AVX-512, which this one lacks; rewriting its "
            f"graph needs onnx ({error}): pip install 'nvlm-trt[build]'"
        ) from None
    model = rewritten(path, cpu.saturates(), cpu.single_rows_differ())
    if model is None:
        return str(path)
    _find_weights(path, options)
    return model.SerializeToString()


def _find_weights(path: Path, options: SessionOptions) -> None:
    """Let a graph that is not read from its file find the weights beside `path`."""
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))


def _needs_rewriting(path: Path) -> bool:
    """Return whether the file names an operator that has a fault on this CPU."""
    if not (cpu.saturates() or cpu.single_rows_differ()):
        return False
    try:
        content = read_bounded(path, GRAPH_BYTES)  # small: without weights
    except OSError:
        return False  # ONNX Runtime says why the file cannot be read
    return (cpu.saturates() and b"MatMulIntegerToFloat" in content) or (
        cpu.single_rows_differ() and b"MatMulNBits" in content
    )


def bind_input(binding: IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """Bind an input by pointer: `array` is contiguous and outlives the run."""
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_output(binding: IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
