"""The record of a TensorRT-LLM engine in the manifest."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nvlm_trt.engine import Engine, read_record


class TrtLlmRecord(BaseModel):
    """Says what an engine was built by and for."""

    model_config = ConfigDict(extra="forbid")

    version: str  # version of TensorRT-LLM: only this version reads the engines
    dtype: Literal["bf16", "fp16"]  # of everything that is not quantised
    tp: int = Field(ge=1)  # GPUs that share every layer
    pp: int = Field(ge=1)  # groups of layers, each on GPUs of its own
    form: Literal["checkpoint", "engine"]  # "checkpoint": trtllm-build has not run yet
    quantization: str | None  # TensorRT-LLM's name of the algorithm
    kv_cache_quantization: str | None
    max_prompt_table: int = Field(ge=0)  # image embeddings per request (D, H)
    max_encoder_len: int = Field(ge=0)  # cross-attended tokens per request (X, H)
    max_num_tokens: int = Field(ge=1)  # tokens in one step of all requests
    container: str  # a container with this TensorRT-LLM

    @property
    def ranks(self) -> int:
        """Count the GPUs, each with a process of its own."""
        return self.tp * self.pp


def record_of(engine: Engine) -> TrtLlmRecord:
    """Return the record of an engine. Raises EngineError if it is missing or incomplete."""
    return read_record(engine, TrtLlmRecord)
