"""Runs a decoder graph with caches of its own, step by step."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from stages import ReferenceWeights, session

from nvlm_trt.builders.graphs.cross_attention import CrossAttention, GatedFunction
from nvlm_trt.builders.graphs.decoder import decoder_graph
from nvlm_trt.builders.graphs.self_attention import SelfAttention
from nvlm_trt.limits import EngineLimits
from nvlm_trt.reference.model import ReferenceModel

LIMITS = EngineLimits(max_slots=4, max_seq_len=48, max_image_tokens=40)
CROSS_TOKENS = 32


class DecoderRunner:
    """A decoder session with the caches of `slots` sequences, and the cross-attention inputs that all slots share."""

    def __init__(
        self,
        model: ReferenceModel,
        attention: type[SelfAttention],
        slots: int = 1,
        cross_attention: type[CrossAttention] = GatedFunction,
        cross_tokens: int = CROSS_TOKENS,
        skip_unused: bool = True,
    ) -> None:
        self.model, self.config = model, model.config
        unread = int(not attention.value_dependent_shapes)  # such a form has a row even without image embeddings
        self.no_image_tokens = np.full((unread, self.config.llm.hidden_size), np.nan, np.float32)
        weights = ReferenceWeights(model)
        graph = decoder_graph(
            self.config,
            weights,
            LIMITS,
            attention=attention,
            cross_attention=cross_attention,
            skip_unused=skip_unused,
        )
        self.session: onnxruntime.InferenceSession = session(graph)
        self.untaken = weights.remaining
        llm = self.config.llm
        shape = (slots, llm.num_kv_heads, LIMITS.max_seq_len, llm.head_dim)
        self.cache = {
            f"{kind}.{i}": np.zeros(shape, np.float32) for i in range(llm.num_layers) for kind in ("key", "value")
        }
        self.cross: dict[str, np.ndarray] = {}
        self.reference_kv = None
        if self.config.cross_layers:
            image = torch.randn(cross_tokens, llm.hidden_size, generator=torch.Generator().manual_seed(5))
            self.reference_kv = model.language_model.cross_kv(image)
            for j, (key, value) in enumerate(self.reference_kv):
                for kind, tensor in (("key", key), ("value", value)):
                    padded = np.full((slots, llm.num_kv_heads, LIMITS.max_image_tokens, llm.head_dim), 7, np.float32)
                    padded[:, :, :cross_tokens] = tensor.numpy()
                    self.cross[f"cross_{kind}.{j}"] = padded

    def step(
        self,
        input_ids: np.ndarray,  # [B, S]
        cached: list[int],
        ranges: np.ndarray,  # [B, S, 2]
        image_tokens: np.ndarray | None = None,
        logit_index: list[int] | None = None,
    ) -> np.ndarray:
        batch, tokens = input_ids.shape
        wanted = np.array([tokens - 1] * batch if logit_index is None else logit_index, np.int64)
        (of_graph,) = (entry for entry in self.session.get_inputs() if entry.name == "logit_index")
        feeds = {
            "input_ids": input_ids,
            "write_indices": np.array(cached),
            "logit_index": wanted.reshape(batch, len(wanted) // batch) if len(of_graph.shape) == 2 else wanted,
            "image_tokens": self.no_image_tokens if image_tokens is None else image_tokens,
            **{f"past_{name}": values for name, values in self.cache.items()},
        }
        if self.config.cross_layers:
            feeds |= {"cross_ranges": ranges, **self.cross}
        names = ["logits", *(f"present_{name}" for name in self.cache)]
        logits, *present = self.session.run(names, feeds)
        self.cache = dict(zip(self.cache, present, strict=True))
        return logits

    def reference_logits(
        self, input_ids: np.ndarray, ranges: np.ndarray, image_tokens: np.ndarray | None = None
    ) -> torch.Tensor:
        """Compute the reference's logits [B, S, vocab] of whole sequences."""
        logits, _ = self.model(
            torch.from_numpy(input_ids),
            None if image_tokens is None else torch.from_numpy(image_tokens),
            self.reference_kv,
            torch.from_numpy(ranges),
        )
        return logits


def random_prompt(batch: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make text ids [B, S] and ranges [B, S, 2]: text without image, tags that read their tile, text that reads all."""
    rng = np.random.default_rng(seed)
    ranges = np.zeros((batch, tokens, 2), np.int32)
    third = tokens // 3
    ranges[:, third : 2 * third] = [16, 32]
    ranges[:, 2 * third :] = [0, CROSS_TOKENS]
    return rng.integers(0, 256, (batch, tokens)), ranges
