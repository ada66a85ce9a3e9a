"""Loads and runs one plan of an engine: execution contexts with shared working memory, recorded CUDA graphs.

Tensors are torch's, on the GPU. The runtime gets the addresses of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvlm_trt.backends.plans.runtime import PlanRuntime
from nvlm_trt.errors import DeviceMemoryError, EngineError

Tensors = Mapping[str, Any]  # input or output name -> torch.Tensor


class LoadedPlan:
    """A deserialised plan. Not thread-safe, but several stages may run on threads of their own."""

    def __init__(self, plan: Path, device: str, runtime: PlanRuntime) -> None:
        """Load `plan`. Raises EngineError if the runtime cannot load the plan or memory does not suffice."""
        self._runtime, self._trt, self._torch = runtime, runtime.trt, runtime.torch
        self._plan = plan
        self._stream = self._torch.cuda.Stream(device)
        self.engine = runtime.load(plan)
        size = self.engine.device_memory_size_v2
        self._workspace = self._torch.empty(max(size, 1), dtype=self._torch.uint8, device=device)
        self._contexts: dict[int, Any] = {}  # by profile
        self._recorded: list[Any] = []  # contexts of CUDA graphs

    @property
    def stream(self) -> Any:
        """Return the CUDA stream on which runs, and copies of this stage's tensors, are queued."""
        return self._stream

    def aliased(self) -> dict[str, str]:
        """Return output -> the input whose memory the output has to share."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        outputs = [name for name in names if self.engine.get_tensor_mode(name) == self._trt.TensorIOMode.OUTPUT]
        pairs = {name: self.engine.get_aliased_input_tensor(name) for name in outputs}
        return {output: source for output, source in pairs.items() if source}

    def run(self, profile: int, tensors: Tensors) -> None:
        """Queue one run on the stage's stream. `tensors`, all inputs and outputs, are contiguous and stay alive."""
        context = self._context_of(profile)
        self._bind(context, tensors)
        self._execute(context)

    def output_shape(self, profile: int, inputs: Tensors, output: str) -> tuple[int, ...]:
        """Return the shape of `output` for these inputs."""
        context = self._context_of(profile)
        self._bind(context, inputs)
        return tuple(context.get_tensor_shape(output))

    def record(self, profile: int, tensors: Tensors) -> Any | None:
        """Record a CUDA graph of one run on exactly these tensors, to `replay()` on the stage's stream.

        Runs once before recording, as TensorRT requires. Returns None, after that run, if the runtime says that the
        plan cannot be recorded: `run` it then."""
        # one context per graph: other shapes in a context invalidate the graphs recorded from the context
        context = self._context(profile)
        self._bind(context, tensors)
        self._execute(context)
        self._stream.synchronize()
        if not self._runtime.can_capture(context, self._stream):
            return None
        graph = self._torch.cuda.CUDAGraph()
        # "thread_local", because another thread may allocate during the recording
        with self._torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._execute(context)
        self._recorded.append(context)
        return graph

    def close(self) -> None:
        """Free the plan, its contexts and its recorded graphs."""
        self._contexts.clear()
        self._recorded.clear()
        self.engine = None

    # --- running -----------------------------------------------------------------------------------------------------

    def _context_of(self, profile: int) -> Any:
        if profile not in self._contexts:
            self._contexts[profile] = self._context(profile)
        return self._contexts[profile]

    def _context(self, profile: int) -> Any:
        context = self._runtime.create_context(self.engine)
        if context is None:
            raise DeviceMemoryError(
                f"no GPU memory for running {self._plan}; free the GPU, or rebuild with smaller limits"
            )
        # the runs of one stage follow each other on one stream, so all contexts share one working memory
        context.set_device_memory(self._workspace.data_ptr(), self._workspace.numel())
        if not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise EngineError(f"{self._plan} has no optimisation profile {profile}; rebuild it with `nvlm-trt build`")
        return context

    def _bind(self, context: Any, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            is_input = self.engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            if is_input and not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"{self._plan} does not take {name} of shape {tuple(tensor.shape)}; rebuild it")
            context.set_tensor_address(name, tensor.data_ptr())
        missing = context.infer_shapes()
        assert not missing, f"inputs without shape: {missing}"

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError(f"{self._plan} failed to run (TensorRT's log, above, says why)")
