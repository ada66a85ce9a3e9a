"""Parses an ONNX file with TensorRT-RTX's parser and describes the network that it made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

from layer_reading import Array, Layer, Tensor, constant_values, trt


class Attention(NamedTuple):
    """What one attention layer attends to, and how."""

    causal: str  # NONE, UPPER_LEFT or LOWER_RIGHT
    lengths: bool  # whether key_value_lengths says how many keys are in use
    mask: str | None  # type of the mask
    decomposable: bool  # whether a build may do without a fused kernel


class CacheUpdate(NamedTuple):
    """The tensors of a KV cache update, which TensorRT does in place."""

    cache: str
    updated: str


class _Logger(trt.ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.problems.append(message)


@dataclass(frozen=True)
class ParsedNetwork:
    """A parsed network. `owners` own the memory that the network points to."""

    network: Any
    owners: tuple[Any, ...]

    @staticmethod
    def parse(path: Path) -> ParsedNetwork:
        """Parse an ONNX file. Raise AssertionError with the parser's messages for a file that it refuses."""
        logger = _Logger()
        builder = trt.Builder(logger)
        network = builder.create_network(0)  # strongly typed: RTX has no other networks
        parser = trt.OnnxParser(network, logger)
        accepted = parser.parse_from_file(str(path))
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        assert accepted, "\n".join([*errors, *logger.problems])
        assert not logger.problems, "\n".join(logger.problems)
        return ParsedNetwork(network, (logger, builder, parser))

    @cached_property
    def inputs(self) -> list[Tensor]:
        return [Tensor.of(self.network.get_input(i)) for i in range(self.network.num_inputs)]

    @cached_property
    def outputs(self) -> list[Tensor]:
        return [Tensor.of(self.network.get_output(i)) for i in range(self.network.num_outputs)]

    @cached_property
    def layers(self) -> list[Layer]:
        """Every layer, after the layers whose outputs it reads."""
        return self._ordered([Layer.of(self.network.get_layer(i)) for i in range(self.network.num_layers)])

    def _ordered(self, layers: list[Layer]) -> list[Layer]:
        maker = {layer.output.name: layer for layer in layers}
        assert len(maker) == len(layers), "two tensors have one name"
        given = {tensor.name for tensor in self.inputs}
        read = {
            name: [tensor.name for tensor in layer.inputs if tensor is not None and tensor.name not in given]
            for name, layer in maker.items()
        }
        return [maker[name] for name in TopologicalSorter(read).static_order()]

    @cached_property
    def constants(self) -> dict[str, Array]:
        """Return the name of each constant's tensor -> its values."""
        return {layer.output.name: constant_values(layer.api) for layer in self.of_kind("CONSTANT")}

    def of_kind(self, kind: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == kind]

    def kinds(self) -> Counter[str]:
        return Counter(layer.kind for layer in self.layers)

    def attentions(self) -> Counter[Attention]:
        found = [layer.api.attention for layer in self.of_kind("ATTENTION_INPUT")]
        return Counter(
            Attention(
                attention.causal_kind.name,
                attention.key_value_lengths is not None,
                attention.mask and attention.mask.dtype.name,
                attention.decomposable,
            )
            for attention in found
        )

    def cache_updates(self) -> list[CacheUpdate]:
        updates = self.of_kind("KV_CACHE_UPDATE")
        assert all(layer.inputs[0] for layer in updates)
        return [CacheUpdate(layer.inputs[0].name, layer.output.name) for layer in updates if layer.inputs[0]]

    def maker(self, tensor: Tensor) -> Layer:
        """Return the layer that computed a tensor's numbers: shuffles only give them another shape."""
        (layer,) = (layer for layer in self.layers if layer.output.name == tensor.name)
        return self.maker(layer.inputs[0]) if layer.kind == "SHUFFLE" and layer.inputs[0] else layer

    def readers(self, name: str) -> list[Layer]:
        """Return the layers that read a tensor."""
        return [layer for layer in self.layers if any(tensor and tensor.name == name for tensor in layer.inputs)]
