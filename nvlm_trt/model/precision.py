"""Defines the precisions of components: their names, their sizes, and the option `--precision`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvlm_trt.errors import EngineError
from nvlm_trt.model.components import PARTS, part_of

if TYPE_CHECKING:
    from nvlm_trt.model.config import NvlmConfig

# Linear layers whose quantisation has the same risk are one component: the parts of a model, but the embedding table,
# which is not multiplied unless it is lm_head too.
COMPONENTS = tuple(part for part in PARTS if part != "embedding")

FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
FLOATING = tuple(FLOAT_BYTES)
WEIGHT_ONLY_BITS = {"int8-weight-only": 8, "int4-weight-only": 4}
# bits -> inputs that share a float32 scale. Larger blocks are faster, but with them ONNX Runtime 1.32 adds up a single
# row in another order than several rows, so the bits of a request would depend on its neighbours.
BLOCK = {8: 64, 4: 32}
STATIC = ("int8", "fp8")  # quantise activations with scales that a calibration measures


@dataclass(frozen=True)
class PrecisionTable:
    """The precisions of one backend."""

    backend: str
    default: str  # used without --precision
    names: Mapping[str, tuple[str, ...]]  # name -> the precision of each of COMPONENTS, in their order
    # component -> the floating-point types that it may have, each apart; None: all components have one type of `names`
    floating: Mapping[str, tuple[str, ...]] | None = None

    def parse(self, text: str | None) -> dict[str, str]:
        """Read `NAME`, `component=NAME,...`, or `NAME,component=NAME,...`. Return a precision per component.

        A component that is not mentioned has the precision that the bare NAME, or else the default, gives it. The
        result has all COMPONENTS, also those that a model lacks. Raises EngineError for an unknown or repeated
        component, for a precision that the backend does not compute, and for types that it does not mix."""
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
                f"the backend {self.backend} computes nothing in {name}; choose one of {choices} with --precision"
            )
        raise EngineError(f"precision {name!r} is not one of {choices}; choose with --precision")

    def _check_floating(self, precisions: Mapping[str, str]) -> None:
        chosen = {component: name for component, name in precisions.items() if name in FLOATING}
        if self.floating is not None:
            for component, name in chosen.items():
                if name not in self.floating[component]:
                    raise EngineError(
                        f"--precision {component}={name}: the backend {self.backend} computes {component} in "
                        f"{' or '.join(self.floating[component])}, or quantised"
                    )
            return
        floating = sorted(set(chosen.values()))
        if len(floating) > 1:
            raise EngineError(
                f"--precision mixes {' and '.join(floating)}, an engine of the backend {self.backend} has one "
                "floating-point type; name it first, as in fp16,decoder=int8"
            )


def floating_type(precisions: Mapping[str, str]) -> str:
    """Return the floating-point type in which an engine computes everything that is not quantised."""
    return next((name for name in precisions.values() if name in FLOATING), "bf16")


def components_of(config: NvlmConfig) -> tuple[str, ...]:
    """Return the COMPONENTS that a model has: NVLM-D lacks cross_attention."""
    return COMPONENTS if config.cross_layers else COMPONENTS[:-1]


def component_of(tensor: str) -> str:
    """Return the component of a linear layer, given the name of the layer or of its weight."""
    part = part_of(tensor)
    component = "lm_head" if part == "embedding" else part  # the two are tied
    assert component in COMPONENTS, f"{tensor} is not of a linear layer"
    return component


def quantised_components(precisions: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(component for component, precision in precisions.items() if precision not in FLOATING)


def needs_calibration(precisions: Mapping[str, str]) -> bool:
    return any(precision in STATIC for precision in precisions.values())
