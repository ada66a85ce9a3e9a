"""NVLM-D, -X and -H in plain PyTorch: the oracle for every engine, stage by stage.

Easy to read and to check against transformers, not fast.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import RequestError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import EncodedPrompt
from nvlm_trt.reference.decoder import Cache, Decoder, KeyValue
from nvlm_trt.reference.vision import VisionEncoder, pixel_shuffle, projector


class ReferenceModel(nn.Module):
    """One model. In shapes: n tiles, T image tokens per tile, B sequences of S tokens, C cross-attended tokens."""

    def __init__(self, config: NvlmConfig) -> None:
        super().__init__()
        assert config.image_token_id is not None, "read_config finds it in the tokenizer"
        self.config = config
        self.image_token_id = config.image_token_id
        self.vision_model = VisionEncoder(config.vision)
        self.mlp1 = projector(config)
        self.language_model = Decoder(config)

    @classmethod
    def from_checkpoint(
        cls,
        directory: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lora: Path | None = None,
    ) -> ReferenceModel:
        """Loads every tensor of a checkpoint, with the adapter `lora` merged into it, ready for inference. Raises
        CheckpointError, ConfigError."""
        with Checkpoint.open(directory, lora) as checkpoint:
            with torch.device("meta"):
                model = cls(checkpoint.config)
            weights = {
                name: torch.from_numpy(checkpoint.take(name).load()).to(device, dtype) for name in checkpoint.names
            }
            checkpoint.finish()
        model.load_state_dict(weights, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Tiles [n, 3, E, E] -> image tokens [n, T, hidden]."""
        patches = self.vision_model(pixel_values)  # [n, 4 * T, vision width]
        return self.mlp1(pixel_shuffle(patches, self.config.pixel_shuffle))

    def cross_kv(self, image_tokens: Tensor, tag_ids: Tensor | None = None) -> list[KeyValue]:
        """Cross-attended tiles [n, T, hidden] -> key, value [kv_heads, C, head_dim] of each gated block.

        NVLM-H needs tag_ids [n, tag_length], the tokens of each tile's tag: their text embeddings stand before the
        tile's image tokens, so C = n * (tag_length + T). NVLM-X takes none, C = n * T."""
        if (self.config.architecture == "H") != (tag_ids is not None):
            need = "needs" if tag_ids is None else "takes no"
            raise RequestError(f"cross-attention of NVLM-{self.config.architecture} {need} tile tags")
        if tag_ids is not None:
            image_tokens = torch.cat([self.language_model.embed(tag_ids), image_tokens], dim=1)
        tokens = image_tokens.flatten(0, 1)  # [C, hidden]
        return self.language_model.cross_kv(tokens)

    def forward(
        self,
        input_ids: Tensor,
        image_tokens: Tensor | None = None,
        cross_kv: Sequence[KeyValue] | None = None,
        cross_ranges: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """input_ids [B, S], which follow the tokens in `cache` -> logits [B, S, vocab] and the grown cache.

        image_tokens [M, hidden] replace the M image placeholders among input_ids, in order. `cross_kv` comes from the
        method of that name; each token reads the range [start, end) of its C tokens that cross_ranges [B, S, 2] has."""
        x = self.language_model.embed(input_ids)  # [B, S, hidden]
        places = input_ids == self.image_token_id
        given = 0 if image_tokens is None else len(image_tokens)
        if given != int(places.sum()):
            raise RequestError(
                f"{int(places.sum())} image placeholders in the prompt, {given} image embeddings were given"
            )
        if image_tokens is not None:
            x = x.masked_scatter(places[..., None], image_tokens.to(x.dtype))
        if cross_kv is not None and cross_ranges is None:
            raise RequestError("cross_kv was given without cross_ranges")
        return self.language_model(x, cross_kv, cross_ranges, cache)

    @torch.no_grad()
    def generate(
        self,
        prompt: EncodedPrompt,
        llm_image_tokens: Tensor | None,
        cross_kv: Sequence[KeyValue] | None,
        max_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> list[int]:
        """Generates at most `max_tokens` greedy tokens, up to the first of `stop_ids`; never an image placeholder.

        Generated tokens read every cross-attended token of the prompt."""
        device = self.language_model.model.norm.weight.device
        input_ids = torch.as_tensor(prompt.input_ids, device=device)[None]  # [1, S]
        ranges = torch.as_tensor(prompt.cross_ranges, device=device)[None]  # [1, S, 2]
        everything = torch.tensor([[[0, prompt.cross_tokens]]], dtype=ranges.dtype, device=device)
        generated: list[int] = []
        cache: Cache | None = None
        while len(generated) < max_tokens:
            logits, cache = self(input_ids, llm_image_tokens, cross_kv, ranges, cache)
            last = logits[0, -1]  # [vocab]
            last[self.image_token_id] = -torch.inf
            token_id = int(last.argmax())
            if token_id in stop_ids:
                break
            generated.append(token_id)
            input_ids, ranges, llm_image_tokens = last.argmax().view(1, 1), everything, None
        return generated
