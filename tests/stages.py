"""Random reference models of any config as a source of weights, and their stages as ONNX Runtime sessions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from nvlm_trt.model.config import Architecture, NvlmConfig
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.model import ReferenceModel

IMAGE_TOKEN = 259


def tiny_config(architecture: Architecture, **changes: object) -> NvlmConfig:
    """The tiny preset; fields of `llm`, `vision` and `cross_attention` are changed by dictionaries."""
    config = replace(PRESETS[f"nvlm-{architecture.lower()}-tiny"], image_token_id=IMAGE_TOKEN)
    for name, value in changes.items():
        config = replace(
            config, **{name: replace(getattr(config, name), **value) if isinstance(value, dict) else value}
        )
    return config


def random_reference(config: NvlmConfig, seed: int = 0) -> ReferenceModel:
    """Weights at which activations stay near 1 and every parameter counts."""
    generator = torch.Generator().manual_seed(seed)
    model = ReferenceModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model


class ReferenceWeights:
    """`WeightSource` over a reference model's parameters; `remaining` names those that no graph took."""

    def __init__(self, model: ReferenceModel) -> None:
        self._tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        self.remaining = set(self._tensors)

    def take(self, name: str) -> ArrayTensor:
        self.remaining.remove(name)
        return ArrayTensor(self._tensors[name])


class ArrayTensor:
    def __init__(self, values: np.ndarray) -> None:
        self.shape = values.shape
        self._values = values

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._values[start:stop]


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_close(actual: np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float = 2e-5) -> None:
    """Finite, of equal shape, and within `tolerance` everywhere."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
