"""Decides how an LLM may be split over GPUs: tensor parallelism cuts heads and FFNs, pipeline parallelism cuts layers.

Pipeline stages count the gated cross-attention blocks among the layers: block j stands directly before decoder layer
j * interval.
"""

from __future__ import annotations

from collections.abc import Iterator

from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig

MOST_GPUS = 64  # for one dimension; the choices that an error lists end here


def stacked_layers(config: NvlmConfig) -> tuple[tuple[str, int], ...]:
    """Return the LLM's layers in the order in which they run: ("cross", j) is block j, ("self", i) decoder layer i."""
    return tuple(_stacked_layers(config))


def _stacked_layers(config: NvlmConfig) -> Iterator[tuple[str, int]]:
    blocks = {layer: block for block, layer in enumerate(config.cross_layers)}
    for layer in range(config.llm.num_layers):
        if layer in blocks:
            yield "cross", blocks[layer]
        yield "self", layer


def tensor_sizes(config: NvlmConfig) -> list[int]:
    """Return the sizes of tensor parallelism that fit: they divide the heads and the FFN, and a key-value head belongs
    to whole ranks, or a rank has whole key-value heads."""
    llm = config.llm
    return [
        size
        for size in range(1, min(llm.num_heads, MOST_GPUS) + 1)
        if llm.num_heads % size == 0
        and llm.intermediate_size % size == 0
        and (llm.num_kv_heads % size == 0 or size % llm.num_kv_heads == 0)
    ]


def pipeline_sizes(config: NvlmConfig) -> list[int]:
    """Return the numbers of pipeline stages that all have the same number of layers."""
    layers = len(stacked_layers(config))
    return [size for size in range(1, min(layers, MOST_GPUS) + 1) if layers % size == 0]


def check_parallel(config: NvlmConfig, tp: int, pp: int) -> None:
    """Raise EngineError, naming the sizes that fit, for a `tp` or a `pp` that cannot split the LLM evenly."""
    llm = config.llm
    if tp not in tensor_sizes(config):
        raise EngineError(
            f"--tp {tp} does not split {llm.num_heads} heads, {llm.num_kv_heads} key-value heads and an FFN of "
            f"{llm.intermediate_size} evenly; choose one of {_listed(tensor_sizes(config))}"
        )
    if pp not in pipeline_sizes(config):
        blocks = len(config.cross_layers)
        counted = f"{llm.num_layers} layers" + (f" and {blocks} cross-attention blocks" if blocks else "")
        raise EngineError(
            f"--pp {pp} does not split {counted} into equal stages; choose one of {_listed(pipeline_sizes(config))}"
        )


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
