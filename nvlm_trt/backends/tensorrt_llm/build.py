"""Implements the steps of a build for TensorRT-LLM: its checkpoint, the other parts of the model, `trtllm-build`."""

from __future__ import annotations

from collections.abc import Mapping as Entries
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from nvlm_trt.backends.onnxruntime.build import calibrate
from nvlm_trt.backends.tensorrt_llm import CHUNK
from nvlm_trt.backends.tensorrt_llm.contract import CONTAINER, VERSION
from nvlm_trt.backends.tensorrt_llm.engine_files import CHECKPOINT_FOLDER
from nvlm_trt.backends.tensorrt_llm.image_features import TAG_FILE
from nvlm_trt.backends.tensorrt_llm.options import LlmOptions
from nvlm_trt.backends.tensorrt_llm.record import TrtLlmRecord
from nvlm_trt.backends.tensorrt_llm.trtllm_build import build_llm, check_this_gpu
from nvlm_trt.backends.tensorrt_llm.vision import VISION_FILE
from nvlm_trt.builders.build_steps import BuildJob, BuildSteps
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.formats import Recipe, WeightForm
from nvlm_trt.builders.tensorrt_llm.components import write_tag_embeddings, write_vision_encoder
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm.quantization import LlmQuantization, llm_quantization
from nvlm_trt.builders.tensorrt_llm_checkpoint import check_llm_checkpoint, write_llm_checkpoint
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.model.precision import floating_type

_WHOLE = "whole"


class TensorRtLlmSteps:
    """Implements `BuildSteps`."""

    tools: Sequence[str] = ("safetensors",)
    weight_form = WeightForm.TENSORRT
    trial: BuildSteps | None = None

    def __init__(self, job: BuildJob) -> None:
        """Raises EngineError for GPUs that cannot share the model."""
        self._job = job
        self._options = LlmOptions.read(job.options)
        self._mapping = Mapping(self._options.tp, self._options.pp)
        self._mapping.check(job.source.config)

    def unquantised(self, precisions: Entries[str, str]) -> str:
        return floating_type(precisions)

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        return calibrate(self._job, samples)

    def write_stages(self, directory: Path, recipe: Recipe) -> dict[str, Any] | None:
        """Write TensorRT-LLM's checkpoint, the vision encoder and the tags; then build the LLM's engine, unless the
        options say to stop before.

        An interrupted build of the same engine has left the parts that it had finished, and a checkpoint with a journal
        of its own."""
        job, config = self._job, self._job.source.config
        if not self._options.checkpoint_only:
            check_this_gpu(config, recipe.precisions)
        source, lora, unfinished = job.source.checkpoint_dir, job.source.lora, job.unfinished_in(directory)
        quantization = llm_quantization(config, self._mapping, recipe)
        record = self._record(floating_type(recipe.precisions), quantization)
        folder, vision = directory / CHECKPOINT_FOLDER, directory / VISION_FILE
        if unfinished is None or unfinished.reached(folder) != _WHOLE or not folder.is_dir():
            if unfinished is not None:
                unfinished.note(folder, "begun")
            write_llm_checkpoint(
                source,
                config,
                folder,
                quantization,
                self._mapping,
                record.max_encoder_len,
                job.progress,
                dtype=record.dtype,
                lora=lora,
            )
            check_llm_checkpoint(folder, config)
            if unfinished is not None:
                unfinished.note(folder, _WHOLE)
        if unfinished is None or unfinished.reached(vision) != _WHOLE:
            write_vision_encoder(source, config, vision, record.dtype, job.progress, lora)
            if unfinished is not None:
                unfinished.note(vision, _WHOLE)
        if config.architecture == "H":
            write_tag_embeddings(source, config, directory / TAG_FILE, record.dtype, lora)
        if not self._options.checkpoint_only:
            record = build_llm(directory, config, job.source.limits, record, job.progress)
        return record.model_dump()

    def _record(self, dtype: str, quantization: LlmQuantization) -> TrtLlmRecord:
        config, limits = self._job.source.config, self._job.source.limits
        return TrtLlmRecord(
            version=VERSION,
            container=CONTAINER,
            dtype=cast(Literal["bf16", "fp16"], dtype),
            tp=self._mapping.tp,
            pp=self._mapping.pp,
            form="checkpoint",
            quantization=quantization.algo,
            kv_cache_quantization=quantization.kv_cache,
            # image embeddings are tokens of the prompt, so a prompt that fits has no more; NVLM-X has none
            max_prompt_table=0 if config.architecture == "X" else limits.max_seq_len,
            max_encoder_len=limits.max_image_tokens if config.cross_layers else 0,
            max_num_tokens=max(CHUNK, limits.max_slots),
        )
