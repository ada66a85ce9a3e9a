"""Makes of an image's tokens what the executor takes: rows of the prompt table, cross-attended tokens, a digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvlm_trt.backends.base import BackendArray, ImageFeatures
from nvlm_trt.backends.tensorrt_llm.tensor_files import load_tensors
from nvlm_trt.backends.tensorrt_llm.torch_device import wait_for
from nvlm_trt.backends.tensorrt_llm.vision import copy_tokens
from nvlm_trt.engine import Engine
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.image_tokens import check_cross_tiles, split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

TAG_FILE = "tag_embeddings.safetensors"
TAG_TENSOR = "tag_embeddings"


@dataclass(frozen=True)
class ExecutorFeatures(ImageFeatures):
    """Holds one image on the GPU. The engine computes the cross-attention keys and values itself."""

    cross_features: BackendArray | None = None  # [C, hidden]; None: the image has no cross-attended tokens
    digest: int = 0  # uint64, of what joins the LLM's sequence; 0: nothing does

    @property
    def cross_tokens(self) -> int:
        return 0 if self.cross_features is None else len(self.cross_features)

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + (0 if self.cross_features is None else self.cross_features.nbytes)


class FeatureMaker:
    """Makes the features of one engine's images."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, dtype: torch.dtype, device: str) -> None:
        """Load NVLM-H's tag embeddings. Raises EngineError if their file does not fit the model."""
        self._dtype, self._device = dtype, device
        self._config = config = engine.config
        self._tags: torch.Tensor | None = None  # [max tiles, tag length, hidden]
        if config.architecture == "H":
            tag_length = PromptEncoder(config, tokenizer).tag_length
            shapes = {TAG_TENSOR: (config.max_tiles, tag_length, config.llm.hidden_size)}
            self._tags = load_tensors(engine.path / TAG_FILE, shapes, self._dtype, device)[TAG_TENSOR]

    def import_tokens(self, tokens: Any) -> torch.Tensor:
        """Copy image tokens [tiles, T, hidden] to the GPU, in the engine's type."""
        return copy_tokens(tokens, self._dtype, self._device)

    def features(self, image_tokens: Any) -> ExecutorFeatures:
        """Make the features of image tokens [tiles, T, hidden], thumbnail last. Raises RequestError."""
        import torch

        in_llm, in_cross = split_tiles(self._config.architecture, len(image_tokens))
        # copied: a view would keep the tokens of all tiles in memory as long as the features are cached
        embeddings = image_tokens[in_llm].flatten(0, 1).clone()  # [m, hidden]
        crossed = image_tokens[in_cross]  # [n, T, hidden]
        check_cross_tiles(self._config, len(crossed))
        if self._tags is not None:
            crossed = torch.cat([self._tags[: len(crossed)], crossed], dim=1)  # [n, tag length + T, hidden]
        cross_features = crossed.flatten(0, 1).clone() if len(crossed) else None  # [C, hidden]
        wait_for(self._device)
        return ExecutorFeatures(embeddings, None, len(image_tokens), cross_features, digest_of(embeddings))


def digest_of(embeddings: torch.Tensor) -> int:
    """Return a uint64 of embeddings [m, hidden], at least 1; 0 without rows.

    The digest is that of the numbers that the LLM reads, not of the image's file: KV that is reused under it was
    computed from the same numbers, wherever they were encoded."""
    import torch

    if not len(embeddings):
        return 0
    content = embeddings.view(torch.uint8).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1
