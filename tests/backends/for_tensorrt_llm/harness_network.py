"""Builds a rank's network with TensorRT-LLM's own front end on TensorRT-RTX's builder, without plugins.

Needs `harness_source.import_tensorrt_llm`. Collective operations become markers that `harness_ranks` plays.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from conditional_network import ConditionalNetwork

ALLREDUCE, ALLGATHER = "COLLECTIVE_SUM.", "COLLECTIVE_CONCATENATION."
MAX_BATCH, MAX_TOKENS = 4, 256


def load_model(checkpoint: Path, rank: int, dtype: str = "float32") -> Any:
    """Load a rank through `from_checkpoint`, as trtllm-build does, with tensors of bf16 widened to `dtype`."""
    from tensorrt_llm.models import MODEL_MAP, PretrainedConfig

    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    # without the plugin, every layer holds a causal mask of the most positions, squared
    config = PretrainedConfig.from_dict({**settings, "dtype": dtype, "max_position_embeddings": MAX_TOKENS})
    config.set_rank(rank)
    to = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return MODEL_MAP[config.architecture].from_checkpoint(
        str(checkpoint),
        config=config,
        preprocess_weights_hook=lambda weights: {
            name: value.to(to) if value.dtype == torch.bfloat16 else value for name, value in weights.items()
        },
    )


def build_network(model: Any, prompt_table: int = 0, attention_plugin: str | None = None) -> ConditionalNetwork:
    """Build the network of a model. `prompt_table`: the most rows of the prompt table.

    Without `attention_plugin` (a dtype) it is the network of prefill alone, over padded rows."""
    import tensorrt_llm.models.modeling_utils as modeling
    from tensorrt_llm.builder import Builder
    from tensorrt_llm.network import net_guard
    from tensorrt_llm.plugin import PluginConfig

    model = modeling.optimize_model(
        model, share_embedding_table=True, use_prompt_tuning=prompt_table > 0, use_optimize_cross_qkv=True
    )
    builder = Builder()
    network = builder.create_network()
    network.plugin_config = PluginConfig()
    with_plugin = attention_plugin is not None
    settings: dict[str, Any] = {
        **dict.fromkeys(("gemm_plugin", "nccl_plugin")),
        **dict.fromkeys(("remove_input_padding", "context_fmha", "paged_kv_cache"), with_plugin),
        "gpt_attention_plugin": attention_plugin,
        "use_fp8_context_fmha": False,  # as the builder sets it for models that are not FP8
    }
    for name, value in settings.items():
        setattr(network.plugin_config, name, value)
    with net_guard(network):
        network.set_named_parameters(model.named_parameters())
        inputs = model.prepare_inputs(
            max_batch_size=MAX_BATCH,
            max_input_len=MAX_TOKENS,
            max_seq_len=MAX_TOKENS,
            max_num_tokens=MAX_BATCH * MAX_TOKENS,
            use_cache=with_plugin,
            prompt_embedding_table_size=prompt_table,
        )
        model(**inputs)
    network._fill_weights()
    # the builder checks that dimensions of one name have one range
    builder._add_optimization_profile(network, builder.create_builder_config(precision="float32"))
    return ConditionalNetwork(network.trt_network, (builder, network, model))


def mark_collectives() -> None:
    """Replace the operations between ranks, in every module that has imported them, by layers of a known name."""
    from tensorrt_llm import functional

    def allreduce(tensor: Any, group: list[int], *arguments: Any, **keywords: Any) -> Any:
        return _mark(tensor, ALLREDUCE)

    def allgather(tensor: Any, group: list[int], gather_dim: int = 0) -> Any:
        return _mark(functional.concat([tensor] * len(group), dim=gather_dim % tensor.ndim()), ALLGATHER)

    doubles = {
        functional.allreduce: allreduce,
        functional.allgather: allgather,
        functional.send: lambda tensor, target: tensor,  # a stage's output is the next stage's input
        functional.recv: lambda tensor, source: tensor,
    }
    for module in list(sys.modules.values()):
        if module.__name__.split(".")[0] in ("tensorrt_llm", "models"):
            for double in [name for name in vars(module) if _is_one_of(vars(module)[name], doubles)]:
                setattr(module, double, doubles[vars(module)[double]])


def _is_one_of(value: Any, functions: dict[Any, Any]) -> bool:
    return any(value is function for function in functions)


def _mark(tensor: Any, kind: str) -> Any:
    """Add a layer that `kind` names, and one that takes another name if it becomes an output of the network."""
    from tensorrt_llm import functional

    network = functional.default_trtnet()
    layer = network.add_identity(tensor.trt_tensor)
    marked = functional._create_tensor(layer.get_output(0), layer)
    marked.trt_tensor.name = f"{kind}{network.num_layers}"
    after = network.add_identity(marked.trt_tensor)
    return functional._create_tensor(after.get_output(0), after)
