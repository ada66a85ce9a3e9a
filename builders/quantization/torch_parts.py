"""Runs single parts of a model with PyTorch, for a calibration by layer on a GPU: the modules of the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_trt.backends.base import FloatArray, RangeArray
from nvlm_trt.builders.quantization.by_layer import HEAD, PATCHES, VISION_LAYER, LlmPart, Part, VisionPart
from nvlm_trt.builders.quantization.magnitudes import BIN_SCALE, BINS, FIRST_BIN, LOWEST_OCTAVE
from nvlm_trt.builders.quantization.observations import Observations, images_are_read
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD
from nvlm_trt.reference.cross_attention import GatedCrossAttentionBlock
from nvlm_trt.reference.decoder import DecoderLayer, KeyValue, rotary_embedding
from nvlm_trt.reference.vision import VisionEmbeddings, VisionLayer, pixel_shuffle, projector

_PATCHES = "vision_model.embeddings"
_TILES = 2  # encoded at once: their attention scores are not small


class TorchParts:
    """Implements `PartRuntime` on one device, in float32."""

    def __init__(self, source: EngineSource, device: str) -> None:
        self._source, self._config, self._device = source, source.config, torch.device(device)

    @property
    def name(self) -> str:
        return f"PyTorch {torch.__version__} on {self._device.type}"

    @contextlib.contextmanager
    def open_vision(self, part: Part, folder: Path) -> Iterator[VisionPart]:
        config, observer = self._config, _Observer()
        with self._source.open_checkpoint() as checkpoint, torch.inference_mode():
            if part.kind == PATCHES:
                module = self._loaded(checkpoint, _PATCHES, lambda: VisionEmbeddings(config.vision))
            elif part.kind == VISION_LAYER:
                name = f"vision_model.encoder.layers.{part.index}"
                module = self._loaded(checkpoint, name, lambda: VisionLayer(config.vision), observer)
            else:
                module = self._loaded(checkpoint, "mlp1", lambda: projector(config), observer)
            yield _TorchVision(part, config, module, observer, self._device)

    @contextlib.contextmanager
    def open_llm(self, part: Part, folder: Path) -> Iterator[LlmPart]:
        config, observer, i = self._config, _Observer(), part.index
        llm = config.llm
        with self._source.open_checkpoint() as checkpoint, torch.inference_mode():
            if part.kind == HEAD:
                norm = self._loaded(
                    checkpoint, "language_model.model.norm", lambda: nn.RMSNorm(llm.hidden_size, llm.norm_eps)
                )
                yield _TorchHead(config, norm, observer, self._device)
                return
            name, block, tags = f"language_model.model.layers.{i}", None, None
            layer = self._loaded(checkpoint, name, lambda: DecoderLayer(llm), observer)
            if i in config.cross_layers:
                cross = config.cross_attention
                assert cross is not None, "cross_layers are those of cross_attention"
                name = f"language_model.cross_layers.{config.cross_layers.index(i)}"
                block = self._loaded(checkpoint, name, lambda: GatedCrossAttentionBlock(llm, cross), observer)
                embedded = self._source.tag_embeddings(checkpoint)
                tags = None if embedded is None else torch.from_numpy(embedded).to(self._device)
            yield _TorchLayer(
                config, layer, cast("GatedCrossAttentionBlock | None", block), tags, observer, self._device
            )

    def _loaded(
        self, checkpoint: Checkpoint, name: str, make: Callable[[], nn.Module], observer: _Observer | None = None
    ) -> nn.Module:
        """Make a module, load the checkpoint's tensors under `name`, and observe its linear layers."""
        with torch.device("meta"):
            module = make()
        weights = {
            key: torch.from_numpy(checkpoint.take(f"{name}.{key}").load()).to(self._device)
            for key in module.state_dict()
        }
        module.load_state_dict(weights, strict=True, assign=True)
        if observer is not None:
            observer.watch(module, name)
        return module.eval().requires_grad_(False)


class _Observer:
    """Adds up what the linear layers of modules get."""

    def __init__(self) -> None:
        self.observations = Observations()

    def watch(self, module: nn.Module, name: str) -> None:
        # the graphs multiply what a gated block's o_proj gets by the gate, the reference what it gives
        gate = torch.tanh(module.attn_gate) if isinstance(module, GatedCrossAttentionBlock) else None
        for key, child in module.named_modules():
            layer = f"{name}.{key}"
            if isinstance(child, nn.Linear) and not layer.endswith(("self_attn.k_proj", "self_attn.v_proj")):
                # the graphs compute a decoder layer's q, k and v, of one input, as one product
                layer = layer.replace("self_attn.q_proj", "self_attn.qkv_proj")
                child.register_forward_pre_hook(partial(self._hook, layer, gate if key == "attn.o_proj" else None))

    def _hook(self, name: str, gate: Tensor | None, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.add(name, inputs[0] if gate is None else inputs[0] * gate)

    def add(self, name: str, x: Tensor) -> None:
        """Observe x [..., inputs]."""
        magnitudes = x.flatten(0, -2).abs()
        counted = magnitudes.nan_to_num(0.0).clamp(min=2.0**LOWEST_OCTAVE).flatten()
        bins = (counted.log() * BIN_SCALE).floor().clamp(FIRST_BIN, FIRST_BIN + BINS - 1).long() - FIRST_BIN
        counts = torch.bincount(bins, minlength=BINS)
        # a maximum with NaN is NaN
        self.observations.add(name, magnitudes.amax(0).cpu().numpy(), counts.cpu().numpy())


class _TorchPart:
    """Implements `OpenPart`."""

    def __init__(self, observer: _Observer, device: torch.device) -> None:
        self._observer, self._device = observer, device

    def observed(self) -> Observations:
        observations, self._observer.observations = self._observer.observations, Observations()
        return observations

    def _given(self, x: FloatArray) -> Tensor:
        return torch.from_numpy(x).to(self._device)


class _TorchVision(_TorchPart):
    def __init__(
        self, part: Part, config: NvlmConfig, module: nn.Module, observer: _Observer, device: torch.device
    ) -> None:
        super().__init__(observer, device)
        self._kind, self._config, self._module = part.kind, config, module

    def encode(self, x: FloatArray) -> FloatArray:
        parts = [self._run(self._given(x[start : start + _TILES])) for start in range(0, len(x), _TILES)]
        encoded: FloatArray = torch.cat(parts).cpu().numpy()
        return encoded

    def _run(self, x: Tensor) -> Tensor:
        if self._kind == PATCHES:
            size = self._config.vision.patch_size
            patches = F.unfold(x, size, stride=size).transpose(1, 2)  # [n, patches, 3 * size * size]
            self._observer.add(f"{_PATCHES}.patch_embedding", patches)
        elif self._kind != VISION_LAYER:
            x = pixel_shuffle(x[:, 1:].contiguous(), self._config.pixel_shuffle)
        result: Tensor = self._module(x)
        return result


class _TorchLayer(_TorchPart):
    def __init__(
        self,
        config: NvlmConfig,
        layer: nn.Module,
        block: GatedCrossAttentionBlock | None,
        tags: Tensor | None,
        observer: _Observer,
        device: torch.device,
    ) -> None:
        super().__init__(observer, device)
        self._config, self._layer, self._block, self._tags = config, layer, block, tags
        self._past: KeyValue | None = None
        self._cross: KeyValue | None = None

    def read_images(self, images: Sequence[FloatArray]) -> None:
        pairs = [self._key_value(self._given(tokens)) for tokens in images]
        self._cross = None
        if pairs:
            keys, values = zip(*pairs, strict=True)
            self._cross = torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _key_value(self, tokens: Tensor) -> KeyValue:
        assert self._block is not None, "only a gated block reads images"
        if self._tags is not None:
            tokens = torch.cat([self._tags[: len(tokens)], tokens], dim=1)  # [n, tag_length + T, hidden]
        return self._block.attn.key_value(tokens.flatten(0, 1))

    def step(self, x: FloatArray, position: int, cross_ranges: RangeArray) -> FloatArray:
        tokens = self._given(x)[None]
        if self._cross is not None and images_are_read(cross_ranges):
            assert self._block is not None
            tokens = self._block(tokens, *self._cross, torch.from_numpy(cross_ranges).to(self._device)[None])
        rotation = rotary_embedding(self._config.llm, position, len(x), tokens)
        y, self._past = self._layer(tokens, rotation, self._past if position else None)
        result: FloatArray = y[0].cpu().numpy()
        return result


class _TorchHead(_TorchPart):
    def __init__(self, config: NvlmConfig, norm: nn.Module, observer: _Observer, device: torch.device) -> None:
        super().__init__(observer, device)
        self._norm = norm
        self._name = (EMBEDDING if config.llm.tie_word_embeddings else LM_HEAD).removesuffix(".weight")

    def read_images(self, images: Sequence[FloatArray]) -> None:
        assert not images, "no gated block stands behind the layers"

    def step(self, x: FloatArray, position: int, cross_ranges: RangeArray) -> FloatArray:
        self._observer.add(self._name, self._norm(self._given(x)))
        return x[:0]
