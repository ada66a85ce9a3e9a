"""Which component is multiplied in which precision: the names, the safe defaults, and the option `--precision`."""

from __future__ import annotations

from collections.abc import Mapping

from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig

# The linear layers of a model by what quantising them puts at risk, and how their tensors' names begin. `lm_head` is
# the embedding table where the two are tied; `cross_attention` is the gated blocks with their keys and values.
_PREFIXES = {
    "vision_encoder": ("vision_model.",),
    "projector": ("mlp1.",),
    "decoder": ("language_model.model.layers.",),
    "lm_head": ("language_model.lm_head", "language_model.model.embed_tokens"),
    "cross_attention": ("language_model.cross_layers.",),
}
COMPONENTS = tuple(_PREFIXES)

# What a name means for each of COMPONENTS, in their order. Quantised vision encoders and projectors misread small
# print: they stay in fp32 unless asked for. The last layer's errors reach the answer directly, but a step reads all of
# it: its weights have 8 bits, its activations are not quantised by a calibration unless asked for.
# fmt: off
PRECISIONS: dict[str, tuple[str, ...]] = {
    # name               vision_encoder projector decoder           lm_head             cross_attention
    "fp32":             ("fp32",        "fp32",  "fp32",             "fp32",             "fp32"),
    "int8":             ("fp32",        "fp32",  "int8",             "int8-weight-only", "int8"),
    "int8-weight-only": ("fp32",        "fp32",  "int8-weight-only", "int8-weight-only", "int8-weight-only"),
    "int4-weight-only": ("fp32",        "fp32",  "int4-weight-only", "int8-weight-only", "int4-weight-only"),
    "fp8":              ("fp32",        "fp32",  "fp8",              "fp32",             "fp8"),
}
# fmt: on
# TensorRT's engines have one floating-point type. fp16 overflows where bf16 does not, so bf16 is what goes unsaid.
# fmt: off
TENSORRT_PRECISIONS: dict[str, tuple[str, ...]] = {
    # name vision_encoder projector decoder lm_head cross_attention
    "fp32": ("fp32",      "fp32",   "fp32", "fp32", "fp32"),
    "fp16": ("fp16",      "fp16",   "fp16", "fp16", "fp16"),
    "bf16": ("bf16",      "bf16",   "bf16", "bf16", "bf16"),
    "int8": ("bf16",      "bf16",   "int8", "bf16", "int8"),
    "fp8":  ("bf16",      "bf16",   "fp8",  "bf16", "fp8"),
}
# fmt: on
FLOATING = ("fp32", "fp16", "bf16")
WEIGHT_ONLY_BITS = {"int8-weight-only": 8, "int4-weight-only": 4}
# By bits, the inputs of an output that share a float32 scale. Larger blocks are faster, but of those ONNX Runtime 1.32
# adds up one row in another order than several, so that a request's bits would depend on its neighbours.
BLOCK = {8: 64, 4: 32}
STATIC = ("int8", "fp8")  # multiply activations by scales that a calibration measures
_GPU_ONLY = ("fp16", "bf16")
_DEFAULTS = {"onnxruntime": "fp32", "tensorrt": "bf16"}  # by backend


def default_precision(backend: str) -> str:
    """What is built where --precision says nothing. Raises EngineError for a backend that there is not."""
    if backend not in _DEFAULTS:
        raise EngineError(f"backend {backend!r} is not one of: {', '.join(_DEFAULTS)}; choose with --backend")
    return _DEFAULTS[backend]


def parse_precision(text: str, backend: str = "onnxruntime") -> dict[str, str]:
    """`NAME`, `component=NAME,...`, or a NAME with components that differ from it -> a precision for each component.

    Components that are not mentioned have the bare name's default, without one fp32, or bf16 for TensorRT. A model may
    lack some of them. Raises EngineError for an unknown or repeated component, for a precision that the backend does
    not compute, and for two floating-point types in an engine for TensorRT."""
    table = TENSORRT_PRECISIONS if backend == "tensorrt" else PRECISIONS
    bare: list[str] = []
    chosen: dict[str, str] = {}
    for part in text.split(","):
        component, equals, name = (word.strip() for word in part.rpartition("="))
        _check_name(name, table)
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
    defaults = dict(zip(COMPONENTS, table[bare[0] if bare else default_precision(backend)], strict=True))
    precisions = defaults | chosen
    floating = sorted(set(precisions.values()) & set(FLOATING))
    if len(floating) > 1:
        raise EngineError(
            f"--precision mixes {' and '.join(floating)}, an engine for TensorRT has one floating-point type; name it "
            "first, as in fp16,decoder=int8"
        )
    return precisions


def floating_type(precisions: Mapping[str, str]) -> str:
    """The floating-point type of an engine: what is not quantised is computed in it."""
    return next((name for name in precisions.values() if name in FLOATING), "bf16")


def components_of(config: NvlmConfig) -> tuple[str, ...]:
    """Those of COMPONENTS that a model has: NVLM-D lacks cross_attention."""
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


def _check_name(name: str, table: Mapping[str, tuple[str, ...]]) -> None:
    if name in table:
        return
    if name in _GPU_ONLY:
        raise EngineError(
            f"precision {name!r} is for GPU backends, onnxruntime would compute it in fp32; choose one of "
            f"{', '.join(table)} with --precision"
        )
    raise EngineError(f"precision {name!r} is not one of {', '.join(table)}; choose with --precision")
