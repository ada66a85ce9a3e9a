"""Which component is multiplied in which precision: the names, what they store, and the option `--precision`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvlm_trt.errors import EngineError

if TYPE_CHECKING:
    from nvlm_trt.model.config import NvlmConfig

# How the tensors of each component begin. Components divide the linear layers by what quantising them puts at risk.
# `lm_head` is the embedding table where the two are tied; `cross_attention` is the gated blocks with their keys and
# values.
_PREFIXES = {
    "vision_encoder": ("vision_model.",),
    "projector": ("mlp1.",),
    "decoder": ("language_model.model.layers.",),
    "lm_head": ("language_model.lm_head", "language_model.model.embed_tokens"),
    "cross_attention": ("language_model.cross_layers.",),
}
COMPONENTS = tuple(_PREFIXES)

FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
FLOATING = tuple(FLOAT_BYTES)
WEIGHT_ONLY_BITS = {"int8-weight-only": 8, "int4-weight-only": 4}
# Inputs that share a float32 scale, by bits. Larger blocks are faster, but ONNX Runtime 1.32 adds up one row of them in
# another order than several, so that a request's bits would depend on its neighbours.
BLOCK = {8: 64, 4: 32}
STATIC = ("int8", "fp8")  # multiply activations by scales that a calibration measures


@dataclass(frozen=True)
class PrecisionTable:
    """The precisions of one backend."""

    backend: str
    default: str  # built where --precision says nothing
    names: Mapping[str, tuple[str, ...]]  # name -> what it means for each of COMPONENTS, in their order

    def parse(self, text: str | None) -> dict[str, str]:
        """`NAME`, `component=NAME,...`, or a NAME with components that differ from it -> a precision per component.

        Components that are not mentioned have the precision that the bare name gives them, without one the default's.
        A model may lack some of them. Raises EngineError for an unknown or repeated component, for a precision that
        the backend does not compute, and for two floating-point types."""
        bare: list[str] = []
        chosen: dict[str, str] = {}
        for part in (self.default if text is None else text).split(","):
            component, equals, name = (word.strip() for word in part.rpartition("="))
            self._check_name(name)
            if not equals:
                bare.append(name)
                continue
            if component not in COMPONENTS:
                raise EngineError(f"--precision: {component!r} is not a component; choose from {', '.join(COMPONENTS)}")
            if component in chosen:
                raise EngineError(f"--precision names {component} twice; give it one precision")
            chosen[component] = name
        if len(bare) > 1:
            raise EngineError(f"--precision names {' and '.join(bare)} for all components; give one, or component=NAME")
        defaults = dict(zip(COMPONENTS, self.names[bare[0] if bare else self.default], strict=True))
        precisions = defaults | chosen
        self._check_floating(precisions)
        return precisions

    def _check_name(self, name: str) -> None:
        if name in self.names:
            return
        choices = ", ".join(self.names)
        if name in FLOATING:
            raise EngineError(
                f"precision {name!r} is for GPU backends, {self.backend} would compute it in {self.default}; choose "
                f"one of {choices} with --precision"
            )
        raise EngineError(f"precision {name!r} is not one of {choices}; choose with --precision")

    def _check_floating(self, precisions: Mapping[str, str]) -> None:
        floating = sorted(set(precisions.values()) & set(FLOATING))
        if len(floating) > 1:
            raise EngineError(
                f"--precision mixes {' and '.join(floating)}, an engine of the backend {self.backend} has one "
                "floating-point type; name it first, as in fp16,decoder=int8"
            )


def floating_type(precisions: Mapping[str, str]) -> str:
    """The floating-point type of an engine, which computes everything that is not quantised in it."""
    return next((name for name in precisions.values() if name in FLOATING), "bf16")


def components_of(config: NvlmConfig) -> tuple[str, ...]:
    """The COMPONENTS that a model has: NVLM-D lacks cross_attention."""
    return COMPONENTS if config.cross_layers else COMPONENTS[:-1]


def component_of(tensor: str) -> str:
    """The component of a linear layer, by its name or its weight's."""
    for component, prefixes in _PREFIXES.items():
        if tensor.startswith(prefixes):
            return component
    raise AssertionError(f"{tensor} is not of a linear layer")


def quantised_components(precisions: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(component for component, precision in precisions.items() if precision not in FLOATING)


def needs_calibration(precisions: Mapping[str, str]) -> bool:
    return any(precision in STATIC for precision in precisions.values())
