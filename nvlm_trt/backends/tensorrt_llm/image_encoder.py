"""Joins the PyTorch vision encoder and projector to one module, under the names of our checkpoint layout."""

from __future__ import annotations

from torch import Tensor, nn

from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.reference.vision import VisionEncoder, pixel_shuffle, projector


class ImageEncoder(nn.Module):
    """Tiles [n, 3, E, E] -> image tokens [n, T, hidden]."""

    def __init__(self, config: NvlmConfig) -> None:
        super().__init__()
        self._shuffle = config.pixel_shuffle
        self.vision_model = VisionEncoder(config.vision)
        self.mlp1 = projector(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        image_tokens: Tensor = self.mlp1(pixel_shuffle(self.vision_model(pixel_values), self._shuffle))
        return image_tokens
