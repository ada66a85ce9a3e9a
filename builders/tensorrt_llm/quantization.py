"""Chooses the quantised form of TensorRT-LLM's linear layers, with the scales and the modules that stay unquantised.

One algorithm holds for the whole checkpoint. Patterns of names say which modules stay in floating point; in these names
the layers of every stage are numbered from 0.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping as Table
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal

from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.precision import FLOATING

if TYPE_CHECKING:
    from nvlm_trt.builders.quantization.formats import Recipe
    from nvlm_trt.builders.quantization.smoothquant import Factors

Algorithm = Literal["FP8", "W8A8_SQ_PER_CHANNEL", "W8A16", "W4A16"]

# our precisions -> quant_algo, kv_cache_quant_algo
ALGORITHMS: Final[Table[str, tuple[Algorithm, Literal["FP8"] | None]]] = {
    "fp8": ("FP8", "FP8"),
    "int8": ("W8A8_SQ_PER_CHANNEL", None),
    "int8-weight-only": ("W8A16", None),
    "int4-weight-only": ("W4A16", None),
}
STATIC: Final = ("FP8", "W8A8_SQ_PER_CHANNEL")  # activations have scales from a calibration
WEIGHT_ONLY: Final = ("W8A16", "W4A16")  # TensorRT-LLM quantises these weights when it loads them

# A list in config.json replaces TensorRT-LLM's default, which these two repeat.
_ALWAYS_EXCLUDED = ("*lm_head", "*vocab_embedding")
# The attention of the blocks reads text (queries) and images (keys, values), which one activation scale would cover.
_CROSS_ATTENTION = "*cross_attention*"
_NEVER_QUANTISED = ("vision_encoder", "projector", "lm_head")
# Factors that would only change this attention.
_UNUSED_FACTORS = re.compile(r"language_model\.cross_layers\.\d+\.(input_layernorm|attn\.\w+)\.\w+")


@dataclass(frozen=True)
class LlmQuantization:
    """Holds the quantisation of an LLM. The default quantises nothing.

    `kv_cache` "FP8": the cache holds E4M3 numbers, all with the scale 1, which TensorRT-LLM uses when nothing was
    calibrated: our calibration observes the inputs of linear layers, not keys and values. Keys or values beyond 448
    saturate. `calibration` and `factors` are those of the model after SmoothQuant."""

    algo: Algorithm | None = None
    kv_cache: Literal["FP8"] | None = None
    exclude_modules: tuple[str, ...] = ()  # patterns beside those that are always excluded
    calibration: Calibration | None = None
    factors: Table[str, Factors] = field(default_factory=dict)  # tensor of our checkpoint -> SmoothQuant's factors

    def excluded(self, config: NvlmConfig) -> tuple[str, ...]:
        """List all patterns of modules that stay in floating point."""
        cross = (_CROSS_ATTENTION,) if config.cross_layers else ()
        return (*_ALWAYS_EXCLUDED, *cross, *self.exclude_modules)

    def covers(self, module: str, config: NvlmConfig) -> bool:
        """Tell whether a linear layer is quantised. `module`: "transformer.layers.0.mlp.fc"."""
        return self.algo is not None and not any(fnmatchcase(module, pattern) for pattern in self.excluded(config))

    def fingerprint(self) -> str:
        """Hash (sha256) the scales and the factors that a checkpoint is written with."""
        digest = hashlib.sha256()
        if self.calibration is not None:
            for name, linear in sorted(self.calibration.linears.items()):
                digest.update(f"{name} {linear.abs_max!r} {linear.clip!r}\n".encode())
        for name, factors in sorted(self.factors.items()):
            for kind, values in (("rows", factors.rows), ("columns", factors.columns)):
                if values is not None:
                    digest.update(f"{name} {kind} {len(values)}\n".encode() + values.tobytes())
        return digest.hexdigest()


def llm_quantization(config: NvlmConfig, mapping: Mapping, recipe: Recipe) -> LlmQuantization:
    """Make the quantisation that a recipe describes.

    Raises EngineError for components that one checkpoint cannot combine."""
    precisions = recipe.precisions
    for component in _NEVER_QUANTISED:
        if precisions[component] not in FLOATING:
            raise EngineError(
                f"{component}={precisions[component]}: TensorRT-LLM engines compute {component} in floating point; "
                "leave it out of --precision"
            )
    decoder = precisions["decoder"]
    cross = precisions["cross_attention"] if config.cross_layers else decoder
    if cross not in (decoder, *FLOATING):
        raise EngineError(
            f"cross_attention={cross} with decoder={decoder}: TensorRT-LLM has one algorithm for all layers; give "
            "cross_attention the decoder's precision or a floating-point type"
        )
    if decoder in FLOATING:
        return LlmQuantization()
    algo, kv_cache = ALGORITHMS[decoder]
    if config.cross_layers:
        # with an FP8 cache, prefill attention computes in FP8 and needs an output scale, which the unquantised
        # cross-attention lacks
        kv_cache = None
    excluded = _ffn_of_blocks(config, mapping) if cross != decoder else ()
    if algo in WEIGHT_ONLY:
        return LlmQuantization(algo, kv_cache, excluded)
    factors = {name: value for name, value in recipe.factors.items() if not _UNUSED_FACTORS.fullmatch(name)}
    return LlmQuantization(algo, kv_cache, excluded, recipe.inputs, factors)


def _ffn_of_blocks(config: NvlmConfig, mapping: Mapping) -> tuple[str, ...]:
    """List patterns that match the FFNs of cross-attention blocks, and of no other layer in any stage.

    Raises EngineError if the blocks have other places in one stage than in another."""
    if config.cross_attention is None or not config.cross_attention.ffn:
        return ()
    places = {
        tuple(i for i, layer in enumerate(mapping.layers(config, stage)) if layer.is_cross)
        for stage in range(mapping.pp)
    }
    if len(places) > 1:
        raise EngineError(
            f"--pp {mapping.pp} puts cross-attention blocks at other places in one stage than in another, so they "
            "cannot be left unquantised by name; give cross_attention the decoder's precision, or choose --pp 1"
        )
    return tuple(f"*layers.{i}.mlp*" for i in places.pop())
