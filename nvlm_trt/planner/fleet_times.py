"""Estimates the times of a prompt and of a token on a fleet of GPUs, from data sheets and assumed efficiencies.

A time is the longer of products and memory traffic, plus what the GPUs send each other. Nothing here was measured; the
assumptions are constants of this file and of `step_times`, and `nvlm-trt plan` prints them.
"""

from __future__ import annotations

from nvlm_trt.model.precision import floating_type
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.fleet import kv_bytes
from nvlm_trt.planner.gpus import Gpu, product_precision
from nvlm_trt.planner.roofline import Roofline
from nvlm_trt.planner.shards import StageShards
from nvlm_trt.planner.step_times import COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, StepTime
from nvlm_trt.prompt.image_tokens import count_image_tokens

LINK_EFFICIENCY = 0.7
MESSAGE_SECONDS = 10e-6  # latency of an all-reduce, and of a transfer to the next stage
NETWORK = 50e9  # bytes per second of a GPU's network card, 400 Gb/s, where a fleet has several nodes


class FleetTimes:
    """Implements `StepTimes` for one engine on tp x pp GPUs. One request passes the stages one after the other."""

    def __init__(self, design: EngineDesign, tp: int, pp: int, gpu: Gpu) -> None:
        config = design.config
        self._design, self._config, self._gpu, self._tp, self._pp = design, config, gpu, tp, pp
        self._roofline = Roofline(design)
        self.chunk_size = self._roofline.chunk_size
        stages = [StageShards(config, design.precisions, tp, pp, stage) for stage in range(pp)]
        shards = [shard for stage in stages for shard in stage]
        self._read = sum(shard.nbytes for shard in shards if shard.read)  # by one rank of every stage
        self._quantised = tp * sum(shard.elements for shard in shards if shard.quantised)
        self._size = design.number_size
        self._float_rate = gpu.rate(floating_type(design.precisions)) * COMPUTE_EFFICIENCY
        self._quantised_rate = gpu.rate(product_precision(design.precisions)) * COMPUTE_EFFICIENCY
        self._bandwidth = gpu.bandwidth.value * MEMORY_EFFICIENCY
        head = 2 * stages[0].kv_heads * config.llm.head_dim  # one token's keys and values in one layer of a rank
        self._self_token = head * config.llm.num_layers * kv_bytes(design)
        self._cross_token = head * len(config.cross_layers) * self._size
        ffns = len(config.cross_layers) if config.cross_attention and config.cross_attention.ffn else 0
        self._all_reduces = 2 * config.llm.num_layers + len(config.cross_layers) + ffns

    def encode(self, tiles: int) -> StepTime:
        """Estimate the time of the vision encoder on one GPU, and of the image's keys and values on all."""
        work = self._roofline.encode(tiles)
        _, cross_tokens = count_image_tokens(self._config, tiles, self._design.tag_length)
        flops = self._roofline.cross_kv(cross_tokens).flops if cross_tokens else 0.0
        return StepTime((work.flops + flops / self._tp) / self._float_rate, work.nbytes / self._bandwidth)

    def chunk(self, tokens: int, position: int, cross_tokens: int) -> StepTime:
        flops = self._roofline.chunk(tokens, position, cross_tokens).flops
        nbytes = self._read + (position + tokens) * self._self_token + cross_tokens * self._cross_token
        return StepTime(self._products(tokens, flops), nbytes / self._bandwidth, self._communication(tokens))

    def decode(self, sequences: int, tokens: int, cross_tokens: int) -> StepTime:
        work = self._roofline.decode(sequences, tokens, cross_tokens)
        nbytes = self._read + sequences * (tokens * self._self_token + cross_tokens * self._cross_token)
        return StepTime(self._products(sequences, work.flops), nbytes / self._bandwidth, self._communication(sequences))

    def _products(self, tokens: int, flops: float) -> float:
        """Compute the seconds of `flops`, of which every token runs the quantised layers once."""
        quantised = min(2 * tokens * self._quantised, flops)
        return (quantised / self._quantised_rate + (flops - quantised) / self._float_rate) / self._tp

    def _communication(self, tokens: int) -> float:
        """Compute the seconds of a step's messages: ring all-reduces of the residual stream [tokens, hidden] after
        every attention and FFN, and its transfer between stages."""
        nbytes = tokens * self._config.llm.hidden_size * self._size
        seconds = 0.0
        if self._tp > 1:
            moved = 2 * (self._tp - 1) / self._tp * nbytes / self._link(self._tp)
            seconds += self._all_reduces * (moved + MESSAGE_SECONDS)
        return seconds + (self._pp - 1) * (nbytes / self._link(self._tp * self._pp) + MESSAGE_SECONDS)

    def _link(self, gpus: int) -> float:
        """Return bytes per second between two of `gpus` GPUs: over the network if they do not fit in a node."""
        across = gpus > self._gpu.per_node and self._gpu.per_node > 1
        return (NETWORK if across else self._gpu.link.value) * LINK_EFFICIENCY
