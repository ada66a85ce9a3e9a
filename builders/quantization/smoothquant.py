"""Moves outliers from activations, which share one scale, to weights: SmoothQuant (Xiao et al. 2022, arXiv 2211.10438).

SmoothQuant divides input channel c of a linear layer by s_c and multiplies column c of the layer's weight by s_c:

    s_c = max|x_c| ** alpha / max|w_c| ** (1 - alpha)

Instead of the input, SmoothQuant divides the tensor that produces the input: the graph gets no new operation, and the
model computes the same. Such a division is exact for a norm's weight, for the rows of v_proj (attention is linear in
its values, and query heads that share a key/value head share its factors) and for the rows of up_proj, which silu(gate)
multiplies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.graphs.common import WeightSource
from nvlm_trt.builders.graphs.streamed import StoredTensor, blocks_of
from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.precision import component_of


@dataclass(frozen=True)
class Migration:
    """Names the tensors of one division: `producers` make the input of `linears` channel by channel."""

    producers: tuple[str, ...]  # tensors [channels] or [channels, inputs]
    consumers: tuple[str, ...]  # weights [outputs, channels]
    linears: tuple[str, ...]  # the graphs' layers of these weights: several weights may be one product
    # the consumers' channels are [heads, shared, width], the producers' channels [heads, width]
    heads: int = 1
    shared: int = 1


@dataclass(frozen=True)
class Factors:
    """Holds the divisors of a tensor's rows and the factors of its columns. None leaves rows or columns unchanged."""

    rows: FloatArray | None = None
    columns: FloatArray | None = None

    def apply(self, values: FloatArray, first: int = 0) -> FloatArray:
        """Apply the factors to rows [first, first + n) of the tensor, [n, ...]."""
        if self.rows is not None:
            rows = self.rows[first : first + len(values)]
            values = values / rows.reshape(-1, *[1] * (values.ndim - 1))
        if self.columns is not None:
            values = values * self.columns
        return values


@dataclass(frozen=True)
class MigratedTensor:
    """Applies factors to a tensor at every read."""

    tensor: StoredTensor
    factors: Factors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> FloatArray:
        return self.factors.apply(self.tensor.rows(start, stop), start)


@dataclass(frozen=True)
class MigratedWeights:
    """Gives the tensors of a checkpoint after SmoothQuant: the model computes the same."""

    weights: WeightSource
    factors: Mapping[str, Factors]

    def take(self, name: str) -> StoredTensor:
        tensor = self.weights.take(name)
        return MigratedTensor(tensor, self.factors[name]) if name in self.factors else tensor


def migrate(
    config: NvlmConfig,
    weights: WeightSource,
    calibration: Calibration,
    precisions: Mapping[str, str],
    alpha: float,
) -> tuple[dict[str, Factors], Calibration]:
    """Compute the factors of every tensor that a migration changes, and the calibration of the migrated model.

    Changes only components in int8: fp8's precision does not depend on a channel's magnitude. `weights` must be a
    separate handle: a handle gives each weight once, and this function reads weights too, some rows at a time."""
    rows: dict[str, FloatArray] = {}
    columns: dict[str, FloatArray] = {}
    linears = dict(calibration.linears)
    for migration in migrations(config):
        if precisions[component_of(migration.consumers[0])] != "int8":
            continue
        consumers = [weights.take(name) for name in migration.consumers]
        column_max = functools.reduce(np.maximum, (np.abs(rows).max(0) for rows in blocks_of(*consumers)))
        observed = [np.array(calibration.of(name, len(column_max)).channels) for name in migration.linears]
        inputs = np.max(observed, axis=0)
        factors = _factors(_of_producers(inputs, migration), _of_producers(column_max, migration), alpha)
        of_channels = _of_consumers(factors, migration)
        rows |= dict.fromkeys(migration.producers, factors)
        columns |= dict.fromkeys(migration.consumers, of_channels)
        for linear, before in zip(migration.linears, observed, strict=True):
            channels = before / of_channels
            # the observed clip is for outliers, which the division has removed
            largest = float(channels.max())
            linears[linear] = LinearInput(abs_max=largest, clip=largest, channels=channels.tolist())
    factors_of = {name: Factors(rows.get(name), columns.get(name)) for name in rows | columns}
    return factors_of, calibration.model_copy(update={"linears": linears})


def migrations(config: NvlmConfig) -> Iterator[Migration]:
    """Yield all divisions that are exact in a model."""
    llm, vision = config.llm, config.vision
    for i in range(vision.num_layers):
        layer = f"vision_model.encoder.layers.{i}"
        for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            parameters = ("weight", "bias") if vision.norm_type == "layer_norm" else ("weight",)
            producers = tuple(f"{layer}.{norm}.{parameter}" for parameter in parameters)
            yield Migration(producers, (f"{layer}.{linear}.weight",), (f"{layer}.{linear}",))
    yield Migration(("mlp1.0.weight", "mlp1.0.bias"), ("mlp1.1.weight",), ("mlp1.1",))
    group = {"heads": llm.num_kv_heads, "shared": llm.num_heads // llm.num_kv_heads}
    for i in range(llm.num_layers):
        layer = f"language_model.model.layers.{i}"
        attention = f"{layer}.self_attn"
        parts = tuple(f"{attention}.{part}_proj.weight" for part in "qkv")
        yield Migration((f"{layer}.input_layernorm.weight",), parts, (f"{attention}.qkv_proj",))
        values = (f"{attention}.v_proj.weight", *([f"{attention}.v_proj.bias"] if llm.qkv_bias else []))
        yield Migration(values, (f"{attention}.o_proj.weight",), (f"{attention}.o_proj",), **group)
        yield from _swiglu(layer)
    for j in range(len(config.cross_layers)):
        block = f"language_model.cross_layers.{j}"
        attention = f"{block}.attn"
        yield Migration((f"{block}.input_layernorm.weight",), (f"{attention}.q_proj.weight",), (f"{attention}.q_proj",))
        output = f"{attention}.o_proj"
        yield Migration((f"{attention}.v_proj.weight",), (f"{output}.weight",), (output,), **group)
        if config.cross_attention is not None and config.cross_attention.ffn:
            yield from _swiglu(block)
    if not llm.tie_word_embeddings:  # a tied table also embeds tokens, so it stays unchanged
        head = "language_model.lm_head"
        yield Migration(("language_model.model.norm.weight",), (f"{head}.weight",), (head,))


def _swiglu(layer: str) -> Iterator[Migration]:
    mlp = f"{layer}.mlp"
    gate_and_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    norm = f"{layer}.post_attention_layernorm.weight"
    yield Migration((norm,), tuple(f"{linear}.weight" for linear in gate_and_up), gate_and_up)
    yield Migration((f"{mlp}.up_proj.weight",), (f"{mlp}.down_proj.weight",), (f"{mlp}.down_proj",))


def _factors(inputs: FloatArray, columns: FloatArray, alpha: float) -> FloatArray:
    """Compute s_c [channels], 1 for a channel that is never used."""
    unused = (inputs == 0) | (columns == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = inputs**alpha / columns ** (1 - alpha)
    return np.where(unused, 1, factors).astype(np.float32)


def _of_producers(channels: FloatArray, migration: Migration) -> FloatArray:
    """Reduce consumers' channels to producers' channels: the largest of those that share a producer's channel."""
    return channels.reshape(migration.heads, migration.shared, -1).max(1).reshape(-1)


def _of_consumers(factors: FloatArray, migration: Migration) -> FloatArray:
    """Expand the producers' factors to the consumers' channels."""
    return np.repeat(factors.reshape(migration.heads, 1, -1), migration.shared, axis=1).reshape(-1)
