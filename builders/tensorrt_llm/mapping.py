"""Splits the LLM over GPUs: tensor parallelism cuts matrices, pipeline parallelism cuts the list of layers.

rank = pp_rank * tp + tp_rank. A stage is the `tp` ranks of one pp_rank: they hold the same layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import LlmConfig, NvlmConfig
from nvlm_trt.model.parallel import check_parallel, stacked_layers

_FOLDERS = {"self": "model.layers", "cross": "cross_layers"}  # of our checkpoint


@dataclass(frozen=True)
class Layer:
    """Names one layer of TensorRT-LLM's list, in which cross-attention blocks are numbered among the LLM's layers."""

    source: str  # prefix of the layer's tensors in our checkpoint
    is_cross: bool  # a gated cross-attention block


@dataclass(frozen=True)
class Mapping:
    """Holds the number of GPUs that share every matrix (`tp`) and the number of stages (`pp`)."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, value in (("tp", self.tp), ("pp", self.pp)):
            if value < 1:
                raise EngineError(f"--{name} {value} is not a number of GPUs; give 1 or more")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    def rank(self, stage: int, tp_rank: int) -> int:
        """Return the number of a rank, which is also the number in the name of the rank's file."""
        return stage * self.tp + tp_rank

    def stage(self, rank: int) -> int:
        """Return the stage (pp_rank) of a rank."""
        return rank // self.tp

    def layers(self, config: NvlmConfig, stage: int) -> tuple[Layer, ...]:
        """List a stage's layers. A layer's place in the list is its number in the rank's file."""
        layers = combined_layers(config)
        count = len(layers) // self.pp
        return layers[stage * count : (stage + 1) * count]

    def check(self, config: NvlmConfig) -> None:
        """Raise EngineError if `tp` does not divide heads and FFN, or if `pp` does not divide the layers."""
        check_parallel(config, self.tp, self.pp)


def combined_layers(config: NvlmConfig) -> tuple[Layer, ...]:
    """List the LLM's layers with the cross-attention blocks among them: block j is number j * (interval + 1)."""
    return tuple(
        Layer(f"language_model.{_FOLDERS[kind]}.{number}", is_cross=kind == "cross")
        for kind, number in stacked_layers(config)
    )


def kv_heads_per_rank(llm: LlmConfig, tp: int) -> int:
    """Return the key/value heads of one rank. With more ranks than heads, several ranks hold the same head."""
    return max(1, llm.num_kv_heads // tp)
