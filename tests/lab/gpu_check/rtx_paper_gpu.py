"""A machine with a GPU made of paper: TensorRT-RTX's runtime and torch.cuda as the checks of gpu_check call them.

Plans compute nothing. Their inputs, outputs and aliases are those that the engine's manifest names, and every call is
checked against the members of the real classes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx_bindings as trt
import torch

from nvlm_trt.backends.tensorrt_rtx.record import RtxRecord
from nvlm_trt.model.config import NvlmConfig

GPU = "a GPU made of paper"
TAG_LENGTH = 1  # of the tiny NVLM-H


class Member:
    """Stands for an object of the real class `kind`: has these members only, and the real class has them all."""

    def __init__(self, kind: type, **members: Any) -> None:
        object.__setattr__(self, "_kind", kind)
        for name, value in members.items():
            assert hasattr(kind, name), f"{kind.__name__} has no {name}"
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        assert isinstance(getattr(self._kind, name, None), property), f"{self._kind.__name__} has no property {name}"
        object.__setattr__(self, name, value)


class Machine:
    """Patches this process. A run of the decoder writes zeros to the logits, except `spared`."""

    def __init__(self, record: RtxRecord, config: NvlmConfig) -> None:
        self.record, self.config = record, config
        self.spared = 0  # so many last logits stay what they are
        self.address: int | None = None  # of the logits
        self.rows = 0
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.capturable = True  # whether plans can be recorded after their first run
        self.aliased = dict(record.aliased)  # what the plans say
        self.runs: list[str] = []

    @contextlib.contextmanager
    def patched(self) -> Iterator[Machine]:
        from nvlm_trt.backends import tensorrt_rtx as room
        from nvlm_trt.backends.tensorrt_rtx import runtime as rtx_runtime

        module = ModuleType("tensorrt_rtx_bindings on paper")
        module.__dict__.update({name: value for name, value in vars(trt).items() if not name.startswith("__")})
        module.__dict__.update(Runtime=self.runtime, __version__=self.record.version)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "DEVICE", "cpu")
            patch.setattr(rtx_runtime, "import_rtx", lambda: module)
            patch.setattr("lab.gpu_check.rtx_plans.import_rtx", lambda: module)
            cuda: dict[str, Any] = {
                "is_available": lambda: True,
                "get_device_name": lambda *_: GPU,
                "get_device_capability": lambda *_: (8, 9),
                "Stream": lambda *_: SimpleNamespace(cuda_stream=7, synchronize=lambda: None),
                "stream": lambda *_: contextlib.nullcontext(),
                "current_stream": lambda *_: SimpleNamespace(synchronize=lambda: None),
                "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.compute("replay")),
                "graph": lambda *_, **__: contextlib.nullcontext(),
            }
            for name, value in cuda.items():
                patch.setattr(torch.cuda, name, value)
            yield self

    def runtime(self, logger: Any) -> Member:
        return Member(
            trt.Runtime,
            engine_header_size=64,
            get_engine_validity=lambda header: (trt.EngineValidity.VALID, 0 * len(header)),
            deserialize_cuda_engine=lambda data: self.engine(),
        )

    def engine(self) -> Member:
        inputs = {name for profiles in self.record.profiles.values() for profile in profiles for name in profile}
        names = sorted(inputs) + sorted(self.record.aliased) + ["logits"]
        mode = trt.TensorIOMode
        return Member(
            trt.ICudaEngine,
            num_io_tensors=len(names),
            device_memory_size_v2=1000,
            get_tensor_name=lambda index: names[index],
            get_tensor_mode=lambda name: mode.INPUT if name in inputs else mode.OUTPUT,
            get_aliased_input_tensor=self.aliased.get,
            create_runtime_config=self.runtime_config,
            create_execution_context=lambda config: self.context(),
        )

    def runtime_config(self) -> Member:
        cache = Member(trt.IRuntimeCache, deserialize=self.runs.append, serialize=lambda: b"kernels")
        return Member(
            trt.IRuntimeConfig,
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: True,
            set_execution_context_allocation_strategy=lambda strategy: None,
        )

    def compute(self, how: str) -> None:
        self.runs.append(how)
        if self.address is not None:
            ctypes.memset(self.address, 0, 4 * (self.rows * self.config.llm.vocab_size - self.spared))

    def context(self) -> Member:
        ran: list[int] = []
        llm, per_tile = self.config.llm, self.config.cross_tokens_per_tile(TAG_LENGTH)

        def bind(name: str, address: int) -> bool:
            if name == "logits":
                self.address = address
            return True

        def shape(name: str, sizes: tuple[int, ...]) -> bool:
            if name == "write_indices":
                (self.rows,) = sizes
            self.sizes[name] = sizes
            return True

        def execute(stream: int) -> bool:
            ran.append(stream)
            self.compute("run")
            return True

        return Member(
            trt.IExecutionContext,
            set_device_memory=lambda address, size: None,
            set_optimization_profile_async=lambda profile, stream: profile in (0, 1),
            set_input_shape=shape,
            set_tensor_address=bind,
            infer_shapes=lambda: [],
            get_tensor_shape=lambda name: (llm.num_kv_heads, self.sizes["image_tokens"][0] * per_tile, llm.head_dim),
            execute_async_v3=execute,
            is_stream_capturable=lambda stream: bool(ran) and self.capturable,
        )


class Here:
    """Runs checks in this process, in the place of `Apart`."""

    def call(self, function: Callable[[], Any], seconds: float, fresh: bool = False) -> Any:
        return function()
