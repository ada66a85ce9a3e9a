"""Estimates the times of a prompt and of a token on a fleet of GPUs, from data sheets and assumed efficiencies.

A time is the longer of products and memory traffic, plus what the GPUs send each other. Nothing here was measured; the
assumptions are constants of this file, and `nvlm-trt plan` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.precision import FLOAT_BYTES, floating_type
from nvlm_trt.planner.fleet import kv_bytes
from nvlm_trt.planner.gpus import Gpu, product_precision
from nvlm_trt.planner.roofline import Roofline, Work
from nvlm_trt.planner.shards import StageShards
from nvlm_trt.prompt.image_tokens import count_image_tokens

COMPUTE_EFFICIENCY = 0.6  # of the data sheet's dense rate
MEMORY_EFFICIENCY = 0.75  # of the data sheet's bandwidth
LINK_EFFICIENCY = 0.7
MESSAGE_SECONDS = 10e-6  # latency of an all-reduce, and of a transfer to the next stage
NETWORK = 50e9  # bytes per second of a GPU's network card, 400 Gb/s, where a fleet has several nodes


@dataclass(frozen=True)
class FleetTime:
    """Seconds, by what takes them."""

    products: float
    memory: float
    communication: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.memory) + self.communication


class FleetTimes:
    """Estimates the times of one engine on tp x pp GPUs. One request passes the stages one after the other."""

    def __init__(
        self,
        config: NvlmConfig,
        limits: EngineLimits,
        precisions: Mapping[str, str],
        backend: BackendSpec,
        tag_length: int,
        tp: int,
        pp: int,
        gpu: Gpu,
    ) -> None:
        """Take the arguments of `plan_fleet`, and the GPU."""
        self._config, self._gpu, self._tp, self._pp = config, gpu, tp, pp
        self._chunk, self._tag_length = backend.prefill_chunk, tag_length
        self._roofline = Roofline(config, limits, precisions, backend, tag_length)
        stages = [StageShards(config, precisions, tp, pp, stage) for stage in range(pp)]
        shards = [shard for stage in stages for shard in stage]
        self._read = sum(shard.nbytes for shard in shards if shard.read)  # by one rank of every stage
        self._quantised = tp * sum(shard.elements for shard in shards if shard.quantised)
        floating = floating_type(precisions)
        self._size = FLOAT_BYTES[floating]
        self._float_rate = gpu.rate(floating) * COMPUTE_EFFICIENCY
        self._quantised_rate = gpu.rate(product_precision(precisions)) * COMPUTE_EFFICIENCY
        self._bandwidth = gpu.bandwidth.value * MEMORY_EFFICIENCY
        head = 2 * stages[0].kv_heads * config.llm.head_dim  # one token's keys and values in one layer of a rank
        self._self_token = head * config.llm.num_layers * kv_bytes(config, precisions)
        self._cross_token = head * len(config.cross_layers) * self._size
        ffns = len(config.cross_layers) if config.cross_attention and config.cross_attention.ffn else 0
        self._all_reduces = 2 * config.llm.num_layers + len(config.cross_layers) + ffns

    def prefill(self, text_tokens: int, tiles: int) -> dict[str, FleetTime]:
        """Estimate the times of a prompt: the vision encoder on one GPU, then the LLM on all. Arguments as for
        `Roofline.prefill`."""
        work = self._roofline.prefill(text_tokens, tiles)
        image_tokens, cross = count_image_tokens(self._config, tiles, self._tag_length)
        tokens = text_tokens + image_tokens
        ends = [*range(self._chunk, tokens, self._chunk), tokens]
        nbytes = sum(self._read + end * self._self_token + cross * self._cross_token for end in ends)
        flops = work["decoder"].flops + (work["cross_kv"].flops if cross else 0)
        times = {}
        if tiles:
            times["vision encoder"] = self._on_one(work["vision_encoder"])
        times["LLM"] = FleetTime(
            self._products(tokens, flops), nbytes / self._bandwidth, self._communication(tokens, len(ends))
        )
        return times

    def decode(self, sequences: int, tokens: int, cross_tokens: int) -> FleetTime:
        """Estimate the time of one token of each of `sequences` sequences. Arguments as for `Roofline.decode`."""
        work = self._roofline.decode(sequences, tokens, cross_tokens)
        nbytes = self._read + sequences * (tokens * self._self_token + cross_tokens * self._cross_token)
        products = self._products(sequences, work.flops)
        return FleetTime(products, nbytes / self._bandwidth, self._communication(sequences, passes=1))

    def _on_one(self, work: Work) -> FleetTime:
        return FleetTime(work.flops / self._float_rate, work.nbytes / self._bandwidth, 0.0)

    def _products(self, tokens: int, flops: float) -> float:
        """Compute the seconds of `flops`, of which every token runs the quantised layers once."""
        quantised = min(2 * tokens * self._quantised, flops)
        return (quantised / self._quantised_rate + (flops - quantised) / self._float_rate) / self._tp

    def _communication(self, tokens: int, passes: int) -> float:
        """Compute the seconds of all messages: ring all-reduces of the residual stream [tokens, hidden] after every
        attention and FFN, and its transfer between stages. `passes`: chunks of the prompt, each with its messages."""
        nbytes = tokens * self._config.llm.hidden_size * self._size
        seconds = 0.0
        if self._tp > 1:
            moved = 2 * (self._tp - 1) / self._tp * nbytes / self._link(self._tp)
            seconds += self._all_reduces * (moved + passes * MESSAGE_SECONDS)
        hops = self._pp - 1
        return seconds + hops * (nbytes / self._link(self._tp * self._pp) + passes * MESSAGE_SECONDS)

    def _link(self, gpus: int) -> float:
        """Return bytes per second between two of `gpus` GPUs: over the network if they do not fit in a node."""
        across = gpus > self._gpu.per_node and self._gpu.per_node > 1
        return (NETWORK if across else self._gpu.link.value) * LINK_EFFICIENCY
