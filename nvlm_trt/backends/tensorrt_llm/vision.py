"""Runs the vision encoder and the projector in PyTorch, on the GPU.

TensorRT-LLM's containers have TensorRT 10.14, which cannot build the graph of our other backends, and torch, in which
the vision encoder is written anyway: the tests compare this code with transformers on a CPU. Its time is in GEMMs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from nvlm_trt.backends.base import (
    BackendArray,
    FloatArray,
    ImageFeatures,
    IntArray,
    RangeArray,
    host_array,
)
from nvlm_trt.backends.tensorrt_llm.record import record_of
from nvlm_trt.backends.tensorrt_llm.tensor_files import load_tensors
from nvlm_trt.backends.tensorrt_llm.torch_device import check_device, torch_dtype, wait_for
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.model.layout import projector_layout, vision_layout

if TYPE_CHECKING:
    import torch

    from nvlm_trt.backends.tensorrt_llm.image_encoder import ImageEncoder

VISION_FILE = "vision_encoder.safetensors"
ENCODE_TILES = 8  # at once: more take memory beside the LLM and make the GEMMs no faster


class TorchVisionEncoder(ClosedOnExit):
    """Implements the part of `StepBackend` that encodes images; the executor does the rest."""

    def __init__(self, engine: Engine, stages: Collection[str], device: str) -> None:
        """Load the weights of an engine onto `device`. Raises EngineError for other stages than vision_encoder."""
        if set(stages) != {"vision_encoder"}:
            self._refuse()
        check_device(device)
        self.config, self.limits = engine.config, engine.limits
        self._device, self._dtype = device, torch_dtype(record_of(engine).dtype)
        shapes = vision_layout(engine.config) | projector_layout(engine.config)
        weights = load_tensors(engine.path / VISION_FILE, shapes, self._dtype, device)
        self._encoder: ImageEncoder | None = _encoder(engine, weights)

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden] on the device."""
        import torch

        assert self._encoder is not None, "closed"
        with torch.no_grad():
            parts = [
                self._encoder(
                    torch.from_numpy(pixel_values[start : start + ENCODE_TILES]).to(self._device, self._dtype)
                )
                for start in range(0, len(pixel_values), ENCODE_TILES)
            ]
            image_tokens: BackendArray = torch.cat(parts)
        wait_for(self._device)
        return image_tokens

    def import_tokens(self, tokens: Any) -> BackendArray:
        """Copy image tokens [tiles, T, hidden] to the device, in the engine's type."""
        return copy_tokens(tokens, self._dtype, self._device)

    def to_host(self, array: BackendArray) -> FloatArray:
        return host_array(array)

    def close(self) -> None:
        self._encoder = None

    # --- not here ----------------------------------------------------------------------------------------------------

    def _refuse(self) -> NoReturn:
        raise EngineError("TensorRT-LLM batches by itself and runs no single steps; ask the engine through a pipeline")

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        self._refuse()

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        self._refuse()

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> BackendArray:
        self._refuse()

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        self._refuse()

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        self._refuse()

    def score_tokens(
        self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray
    ) -> FloatArray | None:
        self._refuse()

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        self._refuse()

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        self._refuse()


def copy_tokens(tokens: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Copy a NumPy array, or any tensor that supports DLPack, to the device."""
    import numpy as np
    import torch

    source = torch.from_numpy(np.ascontiguousarray(tokens)) if isinstance(tokens, np.ndarray) else tokens
    copy = torch.from_dlpack(source).to(device, dtype, copy=True)
    wait_for(device)  # the owner of `tokens` may free them now
    return copy


def _encoder(engine: Engine, weights: dict[str, torch.Tensor]) -> ImageEncoder:
    import torch

    from nvlm_trt.backends.tensorrt_llm.image_encoder import ImageEncoder

    with torch.device("meta"):
        encoder = ImageEncoder(engine.config)
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder.eval().requires_grad_(False)
