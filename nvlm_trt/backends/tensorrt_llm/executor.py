"""Makes a text generator of TensorRT-LLM's executor, which runs in this process and batches by itself."""

from __future__ import annotations

from typing import Any

from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures, StepBackend
from nvlm_trt.backends.tensorrt_llm.contract import Bindings, Executor
from nvlm_trt.backends.tensorrt_llm.contract import Request as ExecutorRequest
from nvlm_trt.backends.tensorrt_llm.engine_files import ENGINE_FOLDER, check_engine_files
from nvlm_trt.backends.tensorrt_llm.executor_config import executor_config
from nvlm_trt.backends.tensorrt_llm.image_features import FeatureMaker
from nvlm_trt.backends.tensorrt_llm.launch import Launch
from nvlm_trt.backends.tensorrt_llm.record import RtllmRecord
from nvlm_trt.backends.tensorrt_llm.requests import RequestMaker
from nvlm_trt.backends.tensorrt_llm.runtime import import_bindings
from nvlm_trt.backends.tensorrt_llm.sampling_config import check_sampling
from nvlm_trt.backends.tensorrt_llm.steps import ExecutorSteps
from nvlm_trt.backends.tensorrt_llm.torch_device import check_device, torch_dtype
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.generator_thread import GeneratorThread
from nvlm_trt.runtime.request import Request


class ExecutorGenerator(GeneratorThread):
    """Implements `TextGenerator`. Calls `on_delta` and `on_error` on a thread of its own."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, vision: StepBackend | None, device: str, max_queue: int
    ) -> None:
        """Load an engine, and take over `vision`, its vision encoder. At most `max_queue` requests wait for a slot.

        Raises EngineError for an engine that this process, or this launch, cannot run."""
        record = check_engine_files(engine)
        launch = Launch.of()
        launch.check(f"engine {engine.path}", record.tp, record.pp)
        if launch.rank:
            raise EngineError(
                f"rank {launch.rank} of this launch serves nobody, rank 0 does; start "
                f"`python -m nvlm_trt.backends.tensorrt_llm.worker {engine.path}` on it"
            )
        check_device(device)
        self._bindings = import_bindings()
        config = engine.config
        assert config.image_token_id is not None, "read_config takes image_token_id from the tokenizer"
        self._vocab_size = config.llm.vocab_size
        self._images = FeatureMaker(engine, tokenizer, record.dtype, device)
        self._requests = RequestMaker(
            self._bindings, config, record, tokenizer.stop_ids, torch_dtype(record.dtype), device
        )
        self._executor = load_executor(self._bindings, engine, record)
        self._vision = vision
        steps = ExecutorSteps(
            self._executor,
            self._bindings.finish_reason,
            self._make_request,
            engine.limits,
            config.image_token_id,
            self._vocab_size,
            tokenizer,
            max_queue,
        )
        super().__init__(steps, "nvlm-executor")

    def submit(self, request: Request) -> None:
        """See `TextGenerator.submit`. Raises ParameterError for sampling parameters that the executor cannot follow."""
        check_sampling(request.sampling, self._vocab_size)
        super().submit(request)

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        assert self._vision is not None, "the engine was opened without its vision encoder"
        return self.import_tokens(self._vision.encode(pixel_values))

    def import_tokens(self, tokens: Any) -> BackendArray:
        copy: BackendArray = self._images.import_tokens(tokens)
        return copy

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        return self._images.features(image_tokens)

    def close(self, drain: bool = True) -> None:
        """See `TextGenerator.close`."""
        self.finish(drain)
        self._executor.shutdown()
        if self._vision:
            self._vision.close()

    def _make_request(self, request: Request, max_tokens: int) -> ExecutorRequest:
        return self._requests.make(request.prompt, request.images, request.sampling, max_tokens)


def load_executor(bindings: Bindings, engine: Engine, record: RtllmRecord) -> Executor:
    """Load the engine of this rank; every rank of the launch does. Raises EngineError if TensorRT-LLM cannot."""
    try:
        return bindings.executor(
            engine.path / ENGINE_FOLDER,
            bindings.model_type.DECODER_ONLY,  # the gated blocks take features, not the output of an encoder's engine
            executor_config(bindings, engine.config, engine.limits, record),
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"TensorRT-LLM cannot load engine {engine.path} ({reason})") from None
