"""Serves requests with the network that trtllm-build would build, step by step, as TensorRT-LLM's runtime batches them.

Prompts are read in chunks, beside requests that generate. What the runtime puts into the inputs is what the C++ sources
of 1.3.0rc3 do: rows of the mask are filled up with True behind a request's own columns, the last row repeats for
generated tokens, `last_token_ids` counts the tokens up to and with each request's last, in every pipeline stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conditional_network import run_network
from harness_attention import AttentionPlayer, Sequence, mark_attention
from harness_models import PROMPT_TABLE, Question, expected, oracle, question, write_ranks
from harness_network import MAX_BATCH, MAX_TOKENS, build_network, load_model, mark_collectives
from layer_reading import Array


class InFlight:
    """The stages of a model, and requests in flight."""

    def __init__(self, checkpoint: Path, directory: Path, pp: int = 1) -> None:
        self._checkpoint = checkpoint
        ranks = write_ranks(checkpoint, directory, 1, pp)
        mark_collectives()
        self._stages = []
        for rank in range(pp):
            layers = mark_attention()
            network = build_network(load_model(ranks, rank), PROMPT_TABLE, "float32")
            self._stages.append((network, layers))
        self._caches: dict[int, list[Sequence]] = {}

    def step(self, batch: list[tuple[int, Question, int]]) -> Array:
        """Read the next tokens of requests, (number, request, how many tokens), those in prefill before the others.
        Return the logits [B, vocab] after the last token of each."""
        for number, asked, tokens in batch:
            for sequence in self._caches.setdefault(number, [Sequence(len(asked.features)) for _ in self._stages]):
                sequence.is_prefill, sequence.now = sequence.done < len(asked.ranges), tokens
        given = self._feeds(batch)
        for stage, (network, layers) in enumerate(self._stages):
            owners = network.owners[1]  # TensorRT-LLM's Network
            feeds = {name: _declared(tensor, given) for name, tensor in owners._inputs.items()}
            player = AttentionPlayer(layers, [self._caches[number][stage] for number, *_ in batch], feeds)
            (result,) = run_network(network, feeds, player).values()
            given["hidden_states_input"] = result
        for number, _, tokens in batch:
            for sequence in self._caches[number]:
                sequence.done += tokens
        return result

    def _feeds(self, batch: list[tuple[int, Question, int]]) -> dict[str, Array]:
        config = oracle(self._checkpoint).config
        hidden = config.llm.hidden_size
        columns = max(len(asked.features) for _, asked, _ in batch)
        table_rows = PROMPT_TABLE // MAX_BATCH
        table = np.zeros((len(batch) * table_rows, hidden), np.float32)
        ids, masks, features, tasks = [], [], [np.zeros((0, hidden), np.float32)], []
        for row, (number, asked, tokens) in enumerate(batch):
            sequence = self._caches[number][0]
            prompt = asked.ids.copy()
            places = prompt == config.image_token_id
            prompt[places] = config.llm.vocab_size + np.arange(places.sum())
            ids.append(prompt[sequence.done : sequence.done + tokens])
            table[row * table_rows : row * table_rows + len(asked.image_tokens)] = asked.image_tokens
            tasks.append(np.full(tokens, row))
            if sequence.is_prefill:
                features.append(asked.features)
            mask = np.ones((tokens, columns), np.bool_)
            ranges = asked.ranges[np.minimum(sequence.done + np.arange(tokens), len(asked.ranges) - 1)]
            own = np.arange(len(asked.features))
            mask[:, : len(own)] = (own >= ranges[:, :1]) & (own < ranges[:, 1:])
            masks.append(mask)
        return {
            "input_ids": np.concatenate(ids).astype(np.int32),
            "last_token_ids": np.cumsum([tokens for *_, tokens in batch]).astype(np.int32),
            "encoder_output": np.concatenate(features),
            "encoder_input_lengths": np.array([len(asked.features) for _, asked, _ in batch], np.int32),
            "encoder_max_input_length": np.zeros(columns, np.int32),
            "cross_attention_mask": np.concatenate(masks),
            "cross_attention_packed_mask": np.zeros((sum(map(len, masks)), 8), np.int32),
            "skip_cross_attn_blocks": np.array([not any(asked.ranges.any() for _, asked, _ in batch)]),
            "prompt_embedding_table": table,
            "tasks": np.concatenate(tasks).astype(np.int32),
            "prompt_vocab_size": np.array([table_rows], np.int32),
            "context_lengths": np.zeros(len(batch), np.int32),
        }


def _declared(tensor: object, given: Mapping[str, Array]) -> Array:
    """Return the value of an input of TensorRT-LLM's network, within the ranges that the network was built for."""
    (profile,) = tensor.profiles  # type: ignore[attr-defined]
    name, rank = tensor.name, len(profile.min)  # type: ignore[attr-defined]
    sizes = {"num_tokens": len(given["cross_attention_mask"]), "batch_size_beam_width": len(given["last_token_ids"])}
    sizes["position_ids_num_tokens_range"] = sizes["num_tokens"]
    names = profile.dimension_names
    shape = [sizes.get(names[axis], profile.min[axis]) for axis in range(rank)]
    kind = {"INT64": np.int64, "BOOL": np.bool_}.get(tensor.dtype.name, np.int32)  # type: ignore[attr-defined]
    value = given[name] if name in given else np.zeros(shape, kind)  # what only the plugin reads
    assert all(profile.min[axis] <= value.shape[axis] <= profile.max[axis] for axis in range(rank)), (
        f"{name} {value.shape} is outside {profile.min} to {profile.max}"
    )
    return value


def inflight_difference(checkpoint: Path, directory: Path, pp: int = 1) -> tuple[float, float]:
    """Serve three requests, one of them text only, and one that joins late. Return the largest difference of a logit
    from the oracle's, and the largest logit."""
    serving = InFlight(checkpoint, directory, pp)
    tokens = 30
    with_tags, text, whole = (
        question(checkpoint, tokens, kind, seed) for seed, kind in enumerate(("tags", "none", "all"))
    )
    prompt = 24  # the later tokens are "generated": their ranges are the last row of the prompt
    requests = {0: with_tags, 1: text, 2: whole}
    steps = [
        [(0, 7), (1, prompt)],  # the first chunk ends inside a tag's tokens
        [(0, 17), (1, 1)],
        [(2, prompt), (0, 1), (1, 1)],
        [(2, 1), (0, 1), (1, 1)],
        [(1, 1)],  # text alone: the blocks are skipped
    ]
    difference = largest = 0.0
    read = dict.fromkeys(requests, 0)
    prompts = {number: _prompt(asked, prompt) for number, asked in requests.items()}
    for step in steps:
        found = serving.step([(number, prompts[number], count) for number, count in step])
        for row, (number, count) in enumerate(step):
            read[number] += count
            wanted = expected(checkpoint, requests[number], read[number])
            assert np.isfinite(found[row]).all()
            difference = max(difference, float(np.abs(found[row, : len(wanted)] - wanted).max()))
            largest = max(largest, float(np.abs(wanted).max()))
    assert max(read.values()) <= MAX_TOKENS
    return difference, largest


def _prompt(asked: Question, tokens: int) -> Question:
    """Return the request whose ranges are known up to its prompt's end."""
    return Question(asked.ids, asked.image_tokens, asked.features, asked.ranges[:tokens])


def refusals_of_builds(checkpoint: Path, directory: Path) -> dict[str, str]:
    """Ask our model class for builds that cannot work, and for one that can. Return its messages."""
    import tensorrt_llm._utils
    from tensorrt_llm.builder import Builder
    from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
    from tensorrt_llm.network import net_guard
    from tensorrt_llm.plugin import PluginConfig

    mark_attention()
    ranks = write_ranks(checkpoint, directory)
    model = load_model(ranks, 0)
    sm_version = tensorrt_llm._utils.get_sm_version
    # what our message names -> a change of the GPU, of the plugins or of the call
    builds: dict[str, dict[str, Any]] = {
        "as it should be": {},
        "a GPU of SM 100 or later": {"sm": 100},
        "--context_fmha disable": {"context_fmha": False},
        "--remove_input_padding disable": {"remove_input_padding": False},
        "--kv_cache_type other than paged": {"paged_kv_cache": False},
        "--use_fp8_context_fmha enable": {"use_fp8_context_fmha": True},
        "a quantised KV cache": {"kv_cache_quant_algo": "FP8"},
        "LoRA": {"lora_plugin": "float32"},
        "--max_beam_width above 1": {"max_beam_width": 2},
        "speculative decoding": {"max_draft_len": 3},
        "--gather_context_logits": {"gather_context_logits": True},
    }
    messages = {}
    for name, changes in builds.items():
        network = Builder().create_network()
        network.plugin_config = PluginConfig()
        plugins = {"gpt_attention_plugin": "float32", "paged_kv_cache": True, "use_fp8_context_fmha": False}
        plugins |= {key: value for key, value in changes.items() if hasattr(network.plugin_config, key)}
        for key, value in plugins.items():
            setattr(network.plugin_config, key, value)
        call = {key: value for key, value in changes.items() if key not in (*plugins, "sm", "kv_cache_quant_algo")}
        built = model
        if "kv_cache_quant_algo" in changes:
            settings = json.loads((ranks / "config.json").read_text(encoding="utf-8"))
            settings["quantization"]["kv_cache_quant_algo"] = changes["kv_cache_quant_algo"]
            built = MODEL_MAP[settings["architecture"]](PretrainedConfig.from_dict(settings))
        tensorrt_llm._utils.get_sm_version = lambda: changes.get("sm", 90)  # noqa: B023 (called in this round)
        limits = {"max_batch_size": 4, "max_input_len": 64, "max_seq_len": 64, "max_num_tokens": 256}
        try:
            with net_guard(network):
                built.prepare_inputs(**limits, use_cache=True, **call)
            messages[name] = "accepted"
        except ValueError as error:
            messages[name] = str(error)
    tensorrt_llm._utils.get_sm_version = sm_version
    return messages
