"""Lists what our model class takes from TensorRT-LLM: names, and the parameters it gives.

Read in the sources of 0.17.0.dev2024121700 and of 1.3.0rc3, which agree on every line but one: the pinned 1.2.1 lies
between them, and was not read itself. Only parameters that both versions have are listed, so `...` may stand for more.
test_harness_front_end.py compares the list with the package that NVLM_TRT_TENSORRT_LLM names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

# module -> one line for each name. A class has the parameters of its __init__.
SIGNATURES = {
    "tensorrt_llm._common": """
def default_net(): ...
""",
    "tensorrt_llm._utils": """
def get_sm_version(): ...  # not in 0.17, where it is asked only for a network with plugins
def int32_array(values): ...
def pad_vocab_size(vocab_size, tp_size): ...
def str_dtype_to_trt(dtype): ...
""",
    "tensorrt_llm.functional": """
def Conditional(condition): ...
def Tensor(name=None, dtype=None, shape=None, dim_range=None, is_network_input=True): ...
def arange(start, end, dtype): ...
def constant(ndarray): ...
def gather_last_token_logits(hidden_states, last_token_ids, remove_input_padding): ...
def index_select(input, dim, index): ...
def op_and(left, right): ...
def recv(tensor, src): ...
def reduce(input, op, dim, keepdim=False): ...
def send(tensor, tgt): ...
def shape(input, dim=None): ...
def tanh(input): ...
def unsqueeze(input, axis): ...
def where(condition, left, right): ...
LayerNormType = ["RmsNorm"]
PositionEmbeddingType = ["learned_absolute"]
""",
    "tensorrt_llm.layers": """
def Attention(*, local_layer_idx, hidden_size, num_attention_heads, num_kv_heads=None, max_position_embeddings=1024,
    attention_head_size=None, qk_layernorm=False, layernorm_type=None, eps=1e-05, attention_mask_type=None, bias=True,
    dtype=None, position_embedding_type=None, tp_group=None, tp_size=1, tp_rank=0, quant_mode=None,
    cross_attention=False, dense_bias=None): ...
def AttentionParams(encoder_input_lengths=None, encoder_max_input_length=None): ...
def ColumnLinear(in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True): ...
def Embedding(num_embeddings, embedding_dim, dtype=None): ...
def GatedMLP(hidden_size, ffn_hidden_size, hidden_act, bias=True, dtype=None, tp_group=None, tp_size=1,
    quant_mode=None): ...
def KeyValueCacheParams(cross_kv_cache_block_offsets=None, host_cross_kv_cache_block_offsets=None,
    host_cross_kv_cache_pool_pointers=None, host_cross_kv_cache_pool_mapping=None): ...
def RmsNorm(normalized_shape, num_groups=1, eps=1e-06, elementwise_affine=True, dtype=None): ...
AttentionMaskType = ["causal"]
""",
    "tensorrt_llm.models": """
MODEL_MAP = ["update"]
""",
    "tensorrt_llm.models.modeling_utils": """
def PretrainedConfig(*, architecture, dtype, hidden_size, num_hidden_layers, num_attention_heads, **keys): ...
def PretrainedModel(config): ...
""",
    "tensorrt_llm.models.qwen.config": """
def QWenConfig(**keys): ...
""",
    "tensorrt_llm.models.qwen.model": """
def QWenDecoderLayer(config, layer_idx): ...
""",
    "tensorrt_llm.module": """
def Module(): ...
def ModuleList(modules): ...
""",
    "tensorrt_llm.parameter": """
def Parameter(value=None, shape=None, dtype=None): ...
""",
}

# (module, class) -> its methods that the model class calls, without self
METHODS = {
    ("tensorrt_llm.functional", "Tensor"): """
def cast(dtype): ...
def mark_output(name=None, dtype=None): ...
def ndim(): ...
""",
    ("tensorrt_llm.functional", "Conditional"): """
def add_input(input): ...
def add_output(true_value, false_value): ...
""",
    ("tensorrt_llm.layers", "Attention"): """
def create_attention_const_params(model_cls, config): ...
def fill_attention_params(model_cls, attention_params): ...
def forward(hidden_states, attention_mask=None, attention_packed_mask=None, use_cache=False, kv_cache_params=None,
    attention_params=None, encoder_output=None, cross_kv_cache_gen=None, skip_attn=None): ...
""",
    ("tensorrt_llm.mapping", "Mapping"): """
def is_first_pp_rank(): ...
def is_last_pp_rank(): ...
def next_pp_rank(): ...
def pp_layers(num_layers): ...
def prev_pp_rank(): ...
""",
    ("tensorrt_llm.models.modeling_utils", "PretrainedModel"): """
def prepare_inputs(max_batch_size, max_input_len, max_seq_len, max_num_tokens, use_cache, max_beam_width=1,
    opt_num_tokens=None, prompt_embedding_table_size=0, max_draft_len=0,
    speculative_decoding_draft_tokens_external=False, gather_context_logits=False, lora_target_modules=None): ...
""",
    ("tensorrt_llm.quantization", "QuantMode"): """
def has_kv_cache_quant(): ...
""",
    ("tensorrt_llm.models.qwen.model", "QWenDecoderLayer"): """
def forward(hidden_states, attention_mask=None, use_cache=False, kv_cache_params=None, attention_params=None): ...
""",
}


class Signature(NamedTuple):
    """A function, or a class by its __init__."""

    positional: list[str]
    keyword_only: list[str]
    required: set[str]
    takes_any: bool  # has **keys

    @staticmethod
    def of(arguments: ast.arguments) -> Signature:
        positional = [argument.arg for argument in arguments.args]
        keyword_only = [argument.arg for argument in arguments.kwonlyargs]
        required = set(positional[: len(positional) - len(arguments.defaults)])
        required |= {name for name, default in zip(keyword_only, arguments.kw_defaults, strict=True) if default is None}
        return Signature(positional, keyword_only, required, arguments.kwarg is not None)

    def problem(self, call: ast.Call) -> str | None:
        """Say what is wrong with the arguments of a call, as far as its text shows."""
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        unpacked = any(keyword.arg is None for keyword in call.keywords)
        if len(call.args) > len(self.positional):
            return f"takes {len(self.positional)} positional arguments, not {len(call.args)}"
        given = {*self.positional[: len(call.args)], *(keyword.arg for keyword in call.keywords if keyword.arg)}
        if unknown := given - {*self.positional, *self.keyword_only}:
            return None if self.takes_any else f"has no parameter {sorted(unknown)}"
        if not starred and not unpacked and (missing := self.required - given):
            return f"lacks {sorted(missing)}"
        return None


def functions(text: str) -> Iterator[tuple[str, Signature]]:
    """Read the functions of an entry of the tables."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, Signature.of(node.args)


def members(text: str) -> Iterator[tuple[str, list[str]]]:
    """Read the names with members, such as enums, of an entry of the tables."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            yield ast.unparse(target), ast.literal_eval(node.value)
