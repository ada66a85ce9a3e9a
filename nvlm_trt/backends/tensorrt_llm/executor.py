"""Makes a text generator of TensorRT-LLM's executor, which runs in this process and batches by itself."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from nvlm_trt.api import SamplingParams
from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures
from nvlm_trt.backends.spec import OpenVision
from nvlm_trt.backends.tensorrt_llm.contract import Bindings, Executor
from nvlm_trt.backends.tensorrt_llm.contract import Request as ExecutorRequest
from nvlm_trt.backends.tensorrt_llm.engine_files import ENGINE_FOLDER, check_engine_files
from nvlm_trt.backends.tensorrt_llm.executor_config import executor_config
from nvlm_trt.backends.tensorrt_llm.image_features import FeatureMaker
from nvlm_trt.backends.tensorrt_llm.launch import Launch
from nvlm_trt.backends.tensorrt_llm.record import TrtLlmRecord
from nvlm_trt.backends.tensorrt_llm.requests import RequestMaker
from nvlm_trt.backends.tensorrt_llm.runtime import import_bindings
from nvlm_trt.backends.tensorrt_llm.sampling_config import check_sampling
from nvlm_trt.backends.tensorrt_llm.steps import ExecutorSteps, first_line
from nvlm_trt.backends.tensorrt_llm.torch_device import check_device, torch_dtype
from nvlm_trt.constraint import Constraint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.lane import IsOver, never
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.generator_thread import GeneratorThread
from nvlm_trt.runtime.grammar import Grammar
from nvlm_trt.runtime.request import Request

logger = logging.getLogger(__name__)


class ExecutorGenerator(GeneratorThread):
    """Implements `TextGenerator`. Calls `on_delta` and `on_error` on a thread of its own."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, open_vision: OpenVision | None, device: str, max_queue: int
    ) -> None:
        """Load an engine and, with `open_vision`, its vision encoder. At most `max_queue` requests wait for a slot.

        Raises EngineError for an engine that this process, or this launch, cannot run."""
        config = engine.config
        assert config.image_token_id is not None, "read_config takes image_token_id from the tokenizer"
        record = check_engine_files(engine)
        check_rank(engine, record)
        check_device(device)
        bindings, dtype = import_bindings(), torch_dtype(record.dtype)
        self._vocab_size = config.llm.vocab_size
        self._images = FeatureMaker(engine, tokenizer, dtype, device)
        self._requests = RequestMaker(bindings, config, record, tokenizer.stop_ids, dtype, device)
        with contextlib.ExitStack() as stack:
            # before the LLM, which takes what it needs of the memory that is left
            self._vision = stack.enter_context(open_vision()) if open_vision else None
            self._executor = load_executor(bindings, engine, record, device)
            stack.pop_all()  # `close` closes the vision encoder
        steps = ExecutorSteps(
            self._executor,
            bindings.finish_reason,
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

    def compile(self, constraint: Constraint, is_over: IsOver = never) -> Grammar:
        """Raise ParameterError: see `submit`, which refuses a constraint."""
        check_sampling(SamplingParams(constraint=constraint), self._vocab_size)
        raise AssertionError("check_sampling refuses constraints")

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

    def _make_request(self, request: Request) -> ExecutorRequest:
        return self._requests.make(request.prompt, request.images, request.sampling, request.max_tokens)


def check_rank(engine: Engine, record: TrtLlmRecord) -> None:
    """Raise EngineError for a launch of another size than the engine's, and on every rank but the one that answers."""
    launch = Launch.of()
    launch.check(f"engine {engine.path}", record.tp, record.pp)
    if launch.rank:
        raise EngineError(
            f"rank {launch.rank} of this launch serves nobody, rank 0 does; start "
            f"`python -m nvlm_trt.backends.tensorrt_llm.worker {engine.path}` on it"
        )


def load_executor(bindings: Bindings, engine: Engine, record: TrtLlmRecord, device: str) -> Executor:
    """Load the engine of this rank; every rank of the launch does. Raises EngineError if TensorRT-LLM cannot."""
    config = executor_config(bindings, engine.config, engine.limits, record, device)
    # decoder only: the gated blocks take features, not the output of an encoder's engine
    kind = bindings.model_type.DECODER_ONLY
    try:
        return bindings.executor(engine.path / ENGINE_FOLDER, kind, config)
    except RuntimeError as error:
        logger.exception("TensorRT-LLM cannot load engine %s", engine.path)
        raise EngineError(f"TensorRT-LLM cannot load engine {engine.path} ({first_line(error)})") from None
