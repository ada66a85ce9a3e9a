"""Plays TensorRT-LLM's ranks in PyTorch: reads config.json and the ranks' files, and nothing of ours.

Written from the meaning of the format alone, in float64. All-reduce, all-gather and send between ranks are sums,
concatenations and assignments here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Ranks:
    """The ranks of a checkpoint: `weights[stage][t]`."""

    config: dict[str, Any]
    weights: list[list[Weights]]

    @classmethod
    def load(cls, directory: Path) -> Ranks:
        config = json.loads((directory / "config.json").read_text())
        tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
        files = [load_file(directory / f"rank{rank}.safetensors") for rank in range(tp * pp)]
        return cls(config, [files[stage * tp : (stage + 1) * tp] for stage in range(pp)])

    def logits(
        self, input_ids: Tensor, table: Tensor | None, encoder_output: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """input_ids [S], of which vocab_size + k is row k of table [P, hidden]; encoder_output [C, hidden];
        mask [S, C] -> logits [S, vocab]."""
        config = self.config
        first = self.weights[0][0]["transformer.vocab_embedding.weight"].double()
        embeddings = first if table is None else torch.cat([first[: config["vocab_size"]], table.double()])
        x = embeddings[input_ids]
        layers = config["num_hidden_layers"] // len(self.weights)
        for stage, ranks in enumerate(self.weights):
            for i in range(layers):
                if stage * layers + i in config.get("cross_attention_layers", ()):
                    assert encoder_output is not None
                    assert mask is not None
                    x = self._block(ranks, f"transformer.layers.{i}", x, encoder_output.double(), mask)
                else:
                    x = self._layer(ranks, f"transformer.layers.{i}", x)
        x = self._norm(self.weights[-1], "transformer.ln_f.weight", x)
        return torch.cat([x @ rank["lm_head.weight"].double().T for rank in self.weights[-1]], -1)[
            :, : config["vocab_size"]
        ]

    def _layer(self, ranks: list[Weights], name: str, x: Tensor) -> Tensor:
        y = self._norm(ranks, f"{name}.input_layernorm.weight", x)
        attended = []
        for rank in ranks:
            query, key, value = self._heads(linear(rank, f"{name}.attention.qkv", y))
            query, key = self._rotate(query), self._rotate(key)
            attended.append(attend(query, key, value, torch.ones(len(x), len(x)).tril().bool()))
        x = x + all_reduce(ranks, f"{name}.attention.dense", attended)
        return x + self._mlp(ranks, name, x)

    def _block(self, ranks: list[Weights], name: str, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        y = self._norm(ranks, f"{name}.input_layernorm.weight", x)
        attended = []
        for rank in ranks:
            query = self._heads(linear(rank, f"{name}.cross_attention.qkv", y))[0]
            _, key, value = self._heads(linear(rank, f"{name}.cross_attention.qkv", tokens))
            if self.config["cross_attention_qk_norm"]:
                query = rms_norm(query, rank[f"{name}.cross_attention.q_layernorm.weight"], self.config["norm_epsilon"])
                key = rms_norm(key, rank[f"{name}.cross_attention.k_layernorm.weight"], self.config["norm_epsilon"])
            attended.append(attend(query, key, value, mask))
        y = x + torch.tanh(gate(ranks, f"{name}.gate_attn")) * all_reduce(
            ranks, f"{name}.cross_attention.dense", attended
        )
        if self.config["cross_attention_ffn"]:
            y = y + torch.tanh(gate(ranks, f"{name}.gate_ffwd")) * self._mlp(ranks, name, y)
        return torch.where(mask.any(-1, keepdim=True), y, x)

    def _mlp(self, ranks: list[Weights], name: str, x: Tensor) -> Tensor:
        y = self._norm(ranks, f"{name}.post_layernorm.weight", x)
        inner = [F.silu(linear(rank, f"{name}.mlp.fc", y)) * linear(rank, f"{name}.mlp.gate", y) for rank in ranks]
        return all_reduce(ranks, f"{name}.mlp.proj", inner)

    def _norm(self, ranks: list[Weights], name: str, x: Tensor) -> Tensor:
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks)
        return rms_norm(x, ranks[0][name], self.config["norm_epsilon"])

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[S, rows of q, k and v] -> [heads of the rank, S, head_size] each."""
        config, tp = self.config, self.config["mapping"]["tp_size"]
        query = config["num_attention_heads"] // tp
        key = -(-config["num_key_value_heads"] // tp)
        heads = qkv.unflatten(-1, (query + 2 * key, config["head_size"])).transpose(0, 1)
        return heads[:query], heads[query : query + key], heads[query + key :]

    def _rotate(self, x: Tensor) -> Tensor:
        """rope_gpt_neox: channel i turns with channel i + head_size / 2. Sines and cosines are float32."""
        size = self.config["head_size"]
        frequencies = 1 / self.config["rotary_base"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequencies
        turn = torch.complex(angles.cos().double(), angles.sin().double())
        turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)


def linear(rank: Weights, name: str, x: Tensor) -> Tensor:
    """x [S, inputs of the rank] -> [S, outputs of the rank]."""
    weight = rank[f"{name}.weight"]
    y = x
    if weight.dtype == torch.float8_e4m3fn:
        scale = rank[f"{name}.activation_scaling_factor"].double()
        y = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
    if weight.dtype == torch.int8:
        scale = rank[f"{name}.activation_scaling_factor"].double()
        x = x * rank[f"{name}.prequant_scaling_factor"].double()
        y = (x / scale).round().clamp(-128, 127) * scale
    y = y @ weight.double().T
    if f"{name}.weights_scaling_factor" in rank:
        y = y * rank[f"{name}.weights_scaling_factor"].double()
    return y + rank[f"{name}.bias"].double() if f"{name}.bias" in rank else y


def all_reduce(ranks: list[Weights], name: str, inputs: list[Tensor]) -> Tensor:
    return torch.stack([linear(rank, name, x) for rank, x in zip(ranks, inputs, strict=True)]).sum(0)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """query [heads, S, D]; key, value [kv_heads, T, D]; mask [S, T] -> [S, heads * D], NaN where a row sees nothing."""
    shared = len(query) // len(key)
    scores = query @ key.repeat_interleave(shared, 0).transpose(1, 2) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(shared, 0)).transpose(0, 1).flatten(1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()


def gate(ranks: list[Weights], name: str) -> Tensor:
    assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks)
    return ranks[0][name].double()
