"""Makes random reference models of any config, as sources of weights, and ONNX Runtime sessions of graphs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from nvlm_trt.backends.onnxruntime.session import InferenceSession, open_session, session_options
from nvlm_trt.model.config import Architecture, NvlmConfig
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.reference.model import ReferenceModel

IMAGE_TOKEN = 259


def tiny_config(architecture: Architecture, **changes: Any) -> NvlmConfig:
    """Return the tiny preset with `changes`; a dictionary changes fields of `llm`, `vision` or `cross_attention`."""
    config = replace(PRESETS[f"nvlm-{architecture.lower()}-tiny"], image_token_id=IMAGE_TOKEN)
    for name, value in changes.items():
        config = replace(
            config, **{name: replace(getattr(config, name), **value) if isinstance(value, dict) else value}
        )
    return config


def random_reference(config: NvlmConfig, seed: int = 0) -> ReferenceModel:
    """Make a model with weights at which activations stay near 1 and every parameter matters."""
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
    """`StoredTensor` over an array."""

    def __init__(self, values: np.ndarray) -> None:
        self.shape = values.shape
        self._values = values

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._values[start:stop]


def session(model: ir.Model, optimised: Path | None = None) -> InferenceSession:
    """Open a model as the product does, on one thread; ONNX Runtime writes what it runs to `optimised`."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = session_options(threads=1)
    if optimised:
        options.optimized_model_filepath = str(optimised)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        path.write_bytes(proto.SerializeToString())
        return open_session(path, options)


def assert_close(actual: np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float = 2e-5) -> None:
    """Assert that `actual` is finite, has the shape of `expected`, and is within `tolerance` of it everywhere."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
