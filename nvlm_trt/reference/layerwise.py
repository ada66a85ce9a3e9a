"""The oracle with one layer in memory: computes what `ReferenceModel` computes, bit for bit, from a checkpoint on disk.

A layer is read, runs everything that is asked of it, and is freed before the next one is read. What flows between the
layers is all that grows with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.layers import ForcedSequence
from nvlm_trt.checkpoint.lazy_weight import LazyWeight
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.layer_loop import Array, Layer, LayerLoop
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD
from nvlm_trt.reference.cross_attention import CrossAttention, GatedCrossAttentionBlock
from nvlm_trt.reference.decoder import DecoderLayer, rotary_embedding
from nvlm_trt.reference.vision import VisionEmbeddings, VisionLayer, pixel_shuffle, projector

# of lm_head, held at a time: 268 MB of Qwen2-72B's. A multiple of the columns that a BLAS computes together: the bits
# of a logit do not depend on the block that it is in.
_HEAD_ROWS = 8192

_Module = TypeVar("_Module", bound=nn.Module)


class LayerwiseReference:
    """One model, over an open checkpoint. In shapes: n tiles, T image tokens per tile, C cross-attended tokens."""

    def __init__(self, checkpoint: Checkpoint, loop: LayerLoop) -> None:
        """`loop` runs the layers, under names that begin with "reference:"."""
        assert checkpoint.config.image_token_id is not None, "read_config finds it in the tokenizer"
        self.config = checkpoint.config
        self._image_token_id = checkpoint.config.image_token_id
        self._checkpoint = checkpoint
        self._loop = loop
        self._weights: dict[str, LazyWeight] = {}

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """Tiles [n, 3, E, E] -> image tokens [n, T, hidden]."""
        names = (f"vision_model.encoder.layers.{i}" for i in range(self.config.vision.num_layers))
        layers: list[Layer] = [
            self._embed_patches,
            *(partial(self._vision_layer, name) for name in names),
            self._project,
        ]
        return self._run("vision encoder", [pixel_values], layers)[0]

    def cross_kv(self, image_tokens: FloatArray, tag_ids: npt.NDArray[np.int64] | None = None) -> FloatArray:
        """Cross-attended tiles [n, T, hidden] of one image -> [cross layers, 2 (key, value), kv_heads, C, head_dim].

        NVLM-H needs tag_ids [n, tag_length], the tokens of each tile's tag; NVLM-X takes none."""
        assert (self.config.architecture == "H") == (tag_ids is not None), "only NVLM-H has tile tags here"
        if tag_ids is not None:
            image_tokens = np.concatenate([self._embed(tag_ids), image_tokens], axis=1)
        tokens = image_tokens.reshape(-1, image_tokens.shape[-1])  # [C, hidden]
        layers = [partial(self._key_value, j) for j in range(len(self.config.cross_layers))]
        _, *pairs = self._run("keys and values", [tokens], layers)
        return np.stack(pairs)

    def logits(self, sequences: Sequence[ForcedSequence]) -> list[FloatArray]:
        """Run each sequence in one pass -> the logits [1 + S - P, vocab] that follow its prompt and its later tokens.

        Each token reads the tokens before it alone, so the pass gives what a run token by token would give, but for
        rounding."""
        layers: list[Layer] = [partial(self._embed_sequences, sequences)]
        cross_before = {layer: j for j, layer in enumerate(self.config.cross_layers)}
        for i in range(self.config.llm.num_layers):
            if i in cross_before:
                layers.append(partial(self._cross_block, cross_before[i], sequences))
            layers.append(partial(self._decoder_layer, i))
        return self._run("decoder", [], [*layers, partial(self._head, sequences)])

    def _run(self, stage: str, arrays: list[Array], layers: Sequence[Layer]) -> list[Array]:
        with torch.inference_mode():
            return self._loop.run(f"reference: {stage}", arrays, layers)

    # --- vision encoder ----------------------------------------------------------------------------------------------

    def _embed_patches(self, arrays: list[Array]) -> list[Array]:
        """[n, 3, E, E] -> [n, 1 + patches, width]."""
        embeddings = self._load(partial(VisionEmbeddings, self.config.vision), "vision_model.embeddings")
        return [embeddings(torch.from_numpy(arrays[0])).numpy()]

    def _vision_layer(self, name: str, arrays: list[Array]) -> list[Array]:
        """[n, 1 + patches, width] -> the same shape."""
        layer = self._load(partial(VisionLayer, self.config.vision), name)
        return [layer(torch.from_numpy(arrays[0])).numpy()]

    def _project(self, arrays: list[Array]) -> list[Array]:
        """[n, 1 + patches, width] -> [n, T, hidden]."""
        patches = torch.from_numpy(arrays[0])[:, 1:]
        mlp1 = self._load(partial(projector, self.config), "mlp1")
        return [mlp1(pixel_shuffle(patches, self.config.pixel_shuffle)).numpy()]

    # --- cross-attention and decoder ---------------------------------------------------------------------------------

    def _key_value(self, j: int, arrays: list[Array]) -> list[Array]:
        """Append [2, kv_heads, C, head_dim] of block j to the arrays, of which the first is [C, hidden]."""
        assert self.config.cross_attention is not None
        make = partial(CrossAttention, self.config.llm, self.config.cross_attention)
        attention = self._load(make, f"language_model.cross_layers.{j}.attn")
        return [*arrays, torch.stack(attention.key_value(torch.from_numpy(arrays[0]))).numpy()]

    def _embed_sequences(self, sequences: Sequence[ForcedSequence], arrays: list[Array]) -> list[Array]:
        """Return the embeddings [1, S, hidden] of each sequence, image tokens in their places."""
        embedded = []
        for sequence in sequences:
            x = torch.from_numpy(self._embed(sequence.input_ids))[None]
            places = np.equal(sequence.input_ids, self._image_token_id)  # [S]
            assert np.count_nonzero(places) == len(sequence.image_tokens), "one image token for each placeholder"
            image_tokens = torch.from_numpy(sequence.image_tokens)
            embedded.append(x.masked_scatter(torch.from_numpy(places)[None, :, None], image_tokens).numpy())
        return embedded

    def _cross_block(self, j: int, sequences: Sequence[ForcedSequence], arrays: list[Array]) -> list[Array]:
        """[1, S, hidden] of each sequence -> as they are; those without cross-attended tokens pass."""
        assert self.config.cross_attention is not None
        make = partial(GatedCrossAttentionBlock, self.config.llm, self.config.cross_attention)
        block = self._load(make, f"language_model.cross_layers.{j}")
        results = []
        for x, sequence in zip(arrays, sequences, strict=True):
            if sequence.cross_kv is not None:
                key, value = torch.from_numpy(sequence.cross_kv[j])
                ranges = torch.from_numpy(sequence.cross_ranges)[None]
                x = block(torch.from_numpy(x), key, value, ranges).numpy()
            results.append(x)
        return results

    def _decoder_layer(self, i: int, arrays: list[Array]) -> list[Array]:
        """[1, S, hidden] of each sequence -> as they are."""
        layer = self._load(partial(DecoderLayer, self.config.llm), f"language_model.model.layers.{i}")
        results = []
        for x in map(torch.from_numpy, arrays):
            rotation = rotary_embedding(self.config.llm, 0, x.shape[1], x)
            results.append(layer(x, rotation, None)[0].numpy())
        return results

    def _head(self, sequences: Sequence[ForcedSequence], arrays: list[Array]) -> list[Array]:
        """[1, S, hidden] of each sequence -> logits [1 + S - P, vocab]."""
        llm = self.config.llm
        norm = self._load(partial(nn.RMSNorm, llm.hidden_size, llm.norm_eps), "language_model.model.norm")
        normed = [norm(torch.from_numpy(x)) for x in arrays]
        head = self._weight(EMBEDDING if llm.tie_word_embeddings else LM_HEAD)
        results = [
            np.empty((x.shape[1] - s.prompt_tokens + 1, llm.vocab_size), np.float32)
            for x, s in zip(arrays, sequences, strict=True)
        ]
        for start in range(0, llm.vocab_size, _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, llm.vocab_size)
            rows = torch.from_numpy(head.rows(start, stop))
            for x, result in zip(normed, results, strict=True):
                # of all tokens: a BLAS may add up in another order for another number of tokens
                result[:, start:stop] = F.linear(x, rows)[0, -len(result) :].numpy()
        return results

    # --- weights -----------------------------------------------------------------------------------------------------

    def _load(self, make: Callable[[], _Module], prefix: str) -> _Module:
        """Make a module and read its parameters, `prefix` before their names."""
        with torch.device("meta"):
            module = make()
        weights = {name: torch.from_numpy(self._weight(f"{prefix}.{name}").load()) for name in module.state_dict()}
        module.load_state_dict(weights, strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def _embed(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """Token ids [...] -> embeddings [..., hidden]: reads the rows of these ids."""
        self._weight(EMBEDDING)  # checks a tied lm_head
        distinct, places = np.unique(ids, return_inverse=True)
        return self._checkpoint.rows(EMBEDDING, distinct)[places.reshape(ids.shape)]

    def _weight(self, name: str) -> LazyWeight:
        """Take a weight from the checkpoint when it is first needed."""
        if name not in self._weights:
            self._weights[name] = self._checkpoint.take(name)
        return self._weights[name]
