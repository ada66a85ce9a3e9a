"""Answers a sample by the PyTorch reference: from encoded images and a prompt to text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nvlm_trt.api import Message
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.image.decoding import load_image
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.reference.decoder import KeyValue
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.reference.preprocess import reference_tiles


class ReferenceAnswer:
    """Answers a sample greedily when called. Shares only prompts and tokenizer with the engines."""

    def __init__(self, checkpoint: Path, max_tokens: int, lora: Path | None = None) -> None:
        """`lora`: an adapter that is merged into the checkpoint's weights."""
        self._model = ReferenceModel.from_checkpoint(checkpoint, lora=lora)
        self._tokenizer = Tokenizer.from_directory(checkpoint)
        self._prompts = PromptEncoder(self._model.config, self._tokenizer)
        self._max_tokens = max_tokens

    @property
    def _config(self) -> NvlmConfig:
        return self._model.config

    @torch.inference_mode()
    def __call__(self, sample: Sample) -> str:
        edge = self._config.vision.image_size
        tiles = [reference_tiles(load_image(data), edge, self._config.max_tiles) for data in sample.images]
        prompt = self._prompts.encode([Message("user", sample.prompt)], [len(image) for image in tiles])
        llm_tokens, cross_kv = self._features(tiles)
        stop_ids = self._tokenizer.stop_ids
        return self._tokenizer.decode(self._model.generate(prompt, llm_tokens, cross_kv, self._max_tokens, stop_ids))

    def _features(self, images: list[Tensor]) -> tuple[Tensor | None, list[KeyValue] | None]:
        """Turns tiles [n, 3, E, E] per image into all images' embeddings [M, hidden], and cross keys and values."""
        if not images:
            return None, None
        in_llm, in_cross = [], []
        for tiles in images:
            tokens = self._model.encode(tiles)  # [n, T, hidden]
            llm_part, cross_part = split_tiles(self._config.architecture, len(tiles))
            in_llm.append(tokens[llm_part].flatten(0, 1))
            in_cross.append(tokens[cross_part])
        llm_tokens, crossed = torch.cat(in_llm), torch.cat(in_cross)
        if len(crossed) == 0:
            return llm_tokens, None
        if self._config.architecture != "H":
            return llm_tokens, self._model.cross_kv(crossed)
        # tags count the tiles of each image from 1; an image of a single tile is a thumbnail only
        tags = [torch.from_numpy(self._prompts.tag_ids(len(part))) for part in in_cross if len(part)]
        return llm_tokens, self._model.cross_kv(crossed, torch.cat(tags))
