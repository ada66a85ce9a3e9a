"""Defines NVLM-X and NVLM-H for TensorRT-LLM 1.2.1:

    trtllm-build --model_cls_file model_class.py --model_cls_name NvlmForCausalLM --workers 1 ...

trtllm-build loads this file by its path, so the file imports nothing of nvlm-trt. Importing it registers the
architectures NVLM_X and NVLM_H, which has to precede the reading of a checkpoint's config.json. Spawned workers
(`--workers` above 1) cannot load it; mpirun can.

In shapes: T tokens of the batch without padding, B requests, C cross-attended tokens of the request that has the most.
Without the attention plugin, which is how our tests run the network on a CPU, T is B, S: B padded rows of S tokens.

Which tokens "see" an image comes from `cross_attention_mask` [T, C], in prefill and in generation, where the runtime
repeats the last row that the request gave. The runtime fills a row up with True from the request's own length to C, so
the columns behind `encoder_input_lengths` do not count.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorrt as trt
from tensorrt_llm._common import default_net
from tensorrt_llm._utils import int32_array, pad_vocab_size, str_dtype_to_trt
from tensorrt_llm.functional import (
    Conditional,
    LayerNormType,
    PositionEmbeddingType,
    Tensor,
    arange,
    constant,
    gather_last_token_logits,
    index_select,
    op_and,
    recv,
    reduce,
    send,
    shape,
    tanh,
    unsqueeze,
    where,
)
from tensorrt_llm.layers import (
    Attention,
    AttentionMaskType,
    AttentionParams,
    ColumnLinear,
    Embedding,
    GatedMLP,
    KeyValueCacheParams,
    RmsNorm,
)
from tensorrt_llm.models import MODEL_MAP
from tensorrt_llm.models.modeling_utils import PretrainedConfig, PretrainedModel
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.models.qwen.model import QWenDecoderLayer
from tensorrt_llm.module import Module, ModuleList
from tensorrt_llm.parameter import Parameter

ARCHITECTURES = ("NVLM_X", "NVLM_H")
# The plugin takes the packed cross-attention mask on GPUs before Blackwell only; on later ones every token would read
# every image token.
_FIRST_SM_WITHOUT_PACKED_MASKS = 100


class NvlmConfig(QWenConfig):
    """Holds a checkpoint's config.json: QWenConfig's keys and the cross-attention's. Refuses any other key."""

    def __init__(
        self,
        *,
        cross_attention: bool,
        skip_cross_attn_blocks: bool,
        cross_attention_layers: list[int],
        num_kv_heads_per_layer: list[int],
        num_kv_heads_per_cross_attn_layer: list[int],
        cross_attention_ffn: bool,
        cross_attention_qk_norm: bool,
        max_encoder_input_len: int,
        **llm: Any,
    ) -> None:
        """Take every key of config.json. `cross_attention_layers`: places of the gated blocks in the list of layers.

        Raises ValueError for an unknown key and for keys that contradict each other."""
        known = {"qwen_type", "seq_length"}  # QWenConfig keeps these without naming them
        for owner in (QWenConfig, PretrainedConfig):
            known |= inspect.signature(owner.__init__).parameters.keys() - {"self", "kwargs"}
        if unknown := sorted(llm.keys() - known - {"tie_word_embeddings"}):
            raise ValueError(f"config.json has unknown keys: {', '.join(unknown)}")
        super().__init__(**llm)
        # The C++ runtime reads these names from the engine's config.json, which `to_dict` makes of all attributes.
        self.cross_attention = cross_attention
        self.skip_cross_attn_blocks = skip_cross_attn_blocks
        self.cross_attention_layers = cross_attention_layers
        self.num_kv_heads_per_layer = num_kv_heads_per_layer
        self.num_kv_heads_per_cross_attn_layer = num_kv_heads_per_cross_attn_layer
        self.cross_attention_ffn = cross_attention_ffn
        self.cross_attention_qk_norm = cross_attention_qk_norm
        self.max_encoder_input_len = max_encoder_input_len
        self._check()

    def _check(self) -> None:
        cross = [layer in self.cross_attention_layers for layer in range(self.num_hidden_layers)]
        heads = self.num_key_value_heads
        contradictions = {
            "architecture": self.architecture not in ARCHITECTURES,
            "cross_attention": self.cross_attention is not True,
            "cross_attention_layers": cross.count(True) != len(self.cross_attention_layers) or True not in cross,
            "num_kv_heads_per_layer": self.num_kv_heads_per_layer != [0 if c else heads for c in cross],
            "num_kv_heads_per_cross_attn_layer": self.num_kv_heads_per_cross_attn_layer
            != [heads if c else 0 for c in cross],
            "max_encoder_input_len": self.max_encoder_input_len < 1,
            # with as many key heads as query heads, Attention expects q, k and v of one head side by side
            "cross_attention_qk_norm": self.cross_attention_qk_norm
            and self.num_attention_heads // self.mapping.tp_size == math.ceil(heads / self.mapping.tp_size),
            "mapping": self.mapping.cp_size > 1,
        }
        if wrong := [key for key, contradicts in contradictions.items() if contradicts]:
            raise ValueError(f"config.json: {', '.join(wrong)} cannot be, for NVLM-X or NVLM-H in TensorRT-LLM 1.2.1")


@dataclass(frozen=True)
class CrossAttentionInputs:
    """Holds what every gated block reads."""

    encoder_output: Tensor  # [sum of cross-attended tokens of requests in prefill, hidden]
    encoder_input_lengths: Tensor  # [B] int32
    mask: Tensor  # [T, C] bool
    packed_mask: Tensor | None  # the mask's bits, as the fused kernel of prefill wants them
    cache_gen: Tensor | None  # [1] bool, which 1.2.1 passes and does not read
    skip: Tensor | None  # [1] bool: no request of the batch has an image


class GatedCrossAttentionLayer(Module):
    """Computes x + tanh(gate_attn) * attention(norm(x), image), then, with an FFN, x + tanh(gate_ffwd) * mlp(norm(x)).

    Selects x itself for a token that sees no image, bit for bit. A row without keys may compute NaN: the selection
    drops it."""

    def __init__(self, config: NvlmConfig, layer: int) -> None:
        super().__init__()
        mapping, dtype = config.mapping, config.dtype
        self.cross_attention = Attention(
            local_layer_idx=layer - mapping.pp_layers(config.num_hidden_layers)[0],
            hidden_size=config.hidden_size,
            attention_head_size=config.head_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            dtype=dtype,
            attention_mask_type=AttentionMaskType.causal,  # the plugin replaces it by the mask's
            bias=False,
            dense_bias=False,
            position_embedding_type=PositionEmbeddingType.learned_absolute,  # which the plugin takes for none
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            tp_rank=mapping.tp_rank,
            quant_mode=config.quant_mode,
            cross_attention=True,
            qk_layernorm=config.cross_attention_qk_norm,
            layernorm_type=LayerNormType.RmsNorm,
            eps=config.norm_epsilon,
        )
        self.input_layernorm = RmsNorm(normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=dtype)
        self.gate_attn = Parameter(shape=(1,), dtype=dtype)
        self.has_ffn = config.cross_attention_ffn
        if self.has_ffn:
            self.post_layernorm = RmsNorm(normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=dtype)
            self.mlp = GatedMLP(
                hidden_size=config.hidden_size,
                ffn_hidden_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                dtype=dtype,
                bias=False,
                tp_group=mapping.tp_group,
                tp_size=mapping.tp_size,
                quant_mode=config.quant_mode,
            )
            self.gate_ffwd = Parameter(shape=(1,), dtype=dtype)

    def forward(
        self,
        x: Tensor,
        cross: CrossAttentionInputs,
        sees: Tensor,
        use_cache: bool,
        kv_cache_params: KeyValueCacheParams,
        attention_params: AttentionParams,
    ) -> Tensor:
        """x [T, hidden], sees [T, 1] bool -> as x."""
        with_plugin = bool(default_net().plugin_config.gpt_attention_plugin)
        attended = self.cross_attention(
            self.input_layernorm(x),
            attention_mask=cross.mask if with_plugin else cross.mask.cast("int32"),
            attention_packed_mask=cross.packed_mask,
            encoder_output=cross.encoder_output,
            use_cache=use_cache,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            cross_kv_cache_gen=cross.cache_gen,
            skip_attn=cross.skip,
        )
        y = x + _gate(self.gate_attn) * (attended[0] if use_cache else attended)
        if self.has_ffn and cross.skip is None:
            y = self._ffn(y)
        elif self.has_ffn:
            branches = Conditional(cross.skip)
            skipped, given = branches.add_input(y), branches.add_input(y)
            y = branches.add_output(skipped, self._ffn(given))
        return where(sees, y, x)

    def _ffn(self, y: Tensor) -> Tensor:
        return y + _gate(self.gate_ffwd) * self.mlp(self.post_layernorm(y))


class NvlmModel(Module):
    """Holds embedding, layers and final norm of one pipeline stage. Layers are numbered within the stage."""

    def __init__(self, config: NvlmConfig) -> None:
        super().__init__()
        self.mapping = config.mapping
        if self.mapping.is_first_pp_rank():
            self.vocab_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
        self.layers = ModuleList(
            [
                (GatedCrossAttentionLayer if i in config.cross_attention_layers else QWenDecoderLayer)(config, i)
                for i in self.mapping.pp_layers(config.num_hidden_layers)
            ]
        )
        if self.mapping.is_last_pp_rank():
            self.ln_f = RmsNorm(normalized_shape=config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)

    def forward(
        self,
        input_ids: Tensor | None,
        hidden_states: Tensor | None,
        prompt: Sequence[Tensor],
        attention_mask: Tensor | None,
        cross: CrossAttentionInputs,
        sees: Tensor,
        use_cache: bool,
        kv_cache_params: KeyValueCacheParams,
        attention_params: AttentionParams,
    ) -> Tensor:
        """input_ids [T], on a later stage hidden_states [T, hidden]; `prompt`: table, tasks, size -> [T, hidden]."""
        if self.mapping.is_first_pp_rank():
            x = self.vocab_embedding(input_ids, *prompt)
        else:
            x = recv(hidden_states, self.mapping.prev_pp_rank())
        # one object serves all layers: the paged cache finds a layer by its number
        caching = {"use_cache": use_cache, "kv_cache_params": kv_cache_params, "attention_params": attention_params}
        for layer in self.layers:
            if isinstance(layer, GatedCrossAttentionLayer):
                x = layer(x, cross, sees, **caching)
            else:
                x = layer(x, attention_mask=attention_mask, **caching)
                x = x[0] if use_cache else x
        return self.ln_f(x) if self.mapping.is_last_pp_rank() else send(x, self.mapping.next_pp_rank())


class NvlmForCausalLM(PretrainedModel):
    """Builds the network of one rank: `from_checkpoint`, `prepare_inputs`, `forward`, as TensorRT-LLM calls them."""

    config_class = NvlmConfig

    def __init__(self, config: NvlmConfig) -> None:
        super().__init__(config)
        self.position_embedding_type = config.position_embedding_type
        Attention.create_attention_const_params(self, config)
        self.transformer = NvlmModel(config)
        if config.mapping.is_last_pp_rank():
            self.lm_head = ColumnLinear(
                config.hidden_size,
                pad_vocab_size(config.vocab_size, config.mapping.tp_size),
                bias=False,
                dtype=config.dtype,
                tp_group=config.mapping.tp_group,
                tp_size=config.mapping.tp_size,
                gather_output=True,
            )

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,  # an input of the engine; rotary positions come from the lengths
        use_cache: bool,
        last_token_ids: Tensor,
        attention_mask: Tensor | None,
        kv_cache_params: KeyValueCacheParams,
        attention_params: AttentionParams,
        cross: CrossAttentionInputs,
        prompt_embedding_table: Tensor | None = None,
        prompt_tasks: Tensor | None = None,
        prompt_vocab_size: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Take what `prepare_inputs` returns. Mark the output `logits` [B, vocab] float32, or `hidden_states_output`
        [T, hidden] of a stage that is not the last."""
        prompt = [] if prompt_embedding_table is None else [prompt_embedding_table, prompt_tasks, prompt_vocab_size]
        x = self.transformer(
            input_ids,
            hidden_states,
            prompt,
            attention_mask,
            cross,
            sees_image(cross.mask, cross.encoder_input_lengths, last_token_ids),
            use_cache,
            kv_cache_params,
            Attention.fill_attention_params(self, attention_params),
        )
        if not self.config.mapping.is_last_pp_rank():
            x.mark_output("hidden_states_output", self.config.dtype)
            return x
        packed = default_net().plugin_config.remove_input_padding
        logits = self.lm_head(gather_last_token_logits(x, last_token_ids, packed))
        logits.mark_output("logits", self.config.logits_dtype)
        return logits

    def prepare_inputs(
        self,
        max_batch_size: int,
        max_input_len: int,
        max_seq_len: int,
        max_num_tokens: int,
        use_cache: bool,
        max_beam_width: int = 1,
        opt_num_tokens: int | None = None,
        prompt_embedding_table_size: int = 0,
        max_draft_len: int = 0,
        speculative_decoding_draft_tokens_external: bool = False,
        gather_context_logits: bool = False,
        lora_target_modules: list[str] | None = None,
    ) -> dict[str, Any]:
        """Declare the network's inputs: those of an LLM, and what the gated blocks read.

        The limit of cross-attended tokens is the config's `max_encoder_input_len`: the builder passes the flag of that
        name to its own architectures only. Raises ValueError for what the blocks cannot do."""
        plugins = default_net().plugin_config
        impossible = {
            "--max_beam_width above 1": max_beam_width > 1,  # the runtime's mask has one row for all beams
            "speculative decoding": max_draft_len > 0 or speculative_decoding_draft_tokens_external,
            "--gather_context_logits": gather_context_logits,
            "LoRA": plugins.lora_plugin is not None or bool(lora_target_modules),
        }
        if plugins.gpt_attention_plugin:
            from tensorrt_llm._utils import get_sm_version  # it asks CUDA

            impossible |= {
                "a GPU of SM 100 or later": get_sm_version() >= _FIRST_SM_WITHOUT_PACKED_MASKS,
                "--context_fmha disable": not plugins.context_fmha,  # the unfused kernels ignore the mask
                "--remove_input_padding disable": not plugins.remove_input_padding,
                "--kv_cache_type other than paged": not (use_cache and plugins.paged_kv_cache),
                # The blocks' attention stays in floating point: the plugin would give FP8 to it in the one case, and
                # its kernels of prefill would take the cache for floating point in the other.
                "--use_fp8_context_fmha enable": plugins.use_fp8_context_fmha,
                "a quantised KV cache": self.config.quant_mode.has_kv_cache_quant(),
            }
        if chosen := [name for name, is_chosen in impossible.items() if is_chosen]:
            raise ValueError(f"{self.config.architecture} cannot be built with {', '.join(chosen)}")

        inputs = super().prepare_inputs(
            max_batch_size=max_batch_size,
            max_input_len=max_input_len,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            use_cache=use_cache,
            max_beam_width=max_beam_width,
            opt_num_tokens=opt_num_tokens,
            prompt_embedding_table_size=prompt_embedding_table_size,
        )
        tokens = inputs["input_ids"] if self.config.mapping.is_first_pp_rank() else inputs["hidden_states"]
        places = 1 if plugins.remove_input_padding else 2  # of T among the dimensions of `tokens`
        rows = [_dimension(tokens, place) for place in range(places)]  # T, or B and S
        batch = _dimension(inputs["attention_params"].context_lengths, 0) if plugins.gpt_attention_plugin else rows[0]
        if inputs["last_token_ids"] is None:  # only the last stage has it; ours needs it in every stage
            inputs["last_token_ids"] = _input("last_token_ids", trt.int32, batch)
        declare = _CrossAttentionDeclaration(self.config, plugins, rows, batch)
        inputs["cross"] = declare.inputs(max_batch_size, max_input_len, max_num_tokens)
        inputs["attention_params"].encoder_input_lengths = inputs["cross"].encoder_input_lengths
        if plugins.gpt_attention_plugin:
            inputs["attention_params"].encoder_max_input_length = declare.max_input_length()
            declare.add_cache(inputs["kv_cache_params"])
        return inputs


# A dimension of an input: its name, and for every optimization profile its size or [least, usual, largest].
Dimension = tuple[str, list[Any]]


class _CrossAttentionDeclaration:
    """Declares what the gated blocks read, by the names that the C++ runtime sets."""

    def __init__(self, config: NvlmConfig, plugins: Any, rows: list[Dimension], batch: Dimension) -> None:
        self._config, self._plugins, self._rows, self._batch = config, plugins, rows, batch
        self._limit = config.max_encoder_input_len
        self._length = self._dynamic("encoder_input_len", 1, self._limit)  # C; 1 if no request has features

    def inputs(self, max_batch_size: int, max_input_len: int, max_num_tokens: int) -> CrossAttentionInputs:
        """Declare features, their lengths, and the masks."""
        config, with_plugin = self._config, bool(self._plugins.gpt_attention_plugin)
        dtype = str_dtype_to_trt(config.dtype)
        features = [self._dynamic("encoder_num_tokens", 0, self._limit * max_batch_size)]  # 0: none is in prefill
        if not self._plugins.remove_input_padding:
            features = [self._batch, self._length]
        mask_rows = max(max_batch_size * math.ceil(max_input_len / 128) * 128, max_num_tokens)
        mask_words = math.ceil(self._limit / 256) * 256 // 32
        return CrossAttentionInputs(
            encoder_output=_input("encoder_output", dtype, *features, self._fixed("hidden_size", config.hidden_size)),
            encoder_input_lengths=_input("encoder_input_lengths", trt.int32, self._batch),
            mask=_input("cross_attention_mask", trt.bool, *self._rows, self._length),
            packed_mask=_input(
                "cross_attention_packed_mask",
                trt.int32,
                self._dynamic("cross_packed_mask_rows", 1, mask_rows),
                self._dynamic("cross_packed_mask_words", 0, mask_words),
            )
            if with_plugin
            else None,
            cache_gen=self._flag("cross_kv_cache_gen") if with_plugin else None,
            skip=self._flag("skip_cross_attn_blocks") if config.skip_cross_attn_blocks else None,
        )

    def max_input_length(self) -> Tensor:
        """Declare `encoder_max_input_length`, whose size, not its values, says C to the plugin: [C] int32."""
        return _input("encoder_max_input_length", trt.int32, self._length)

    def add_cache(self, cache: KeyValueCacheParams) -> None:
        """Declare the paged cache of cross-attention keys and values, and note it in `cache`.

        Layers with and without such keys are two pools."""
        pools = self._dynamic("num_cross_kv_cache_pools", 1, 2)
        blocks = self._dynamic("max_cross_blocks_per_seq", 1, math.ceil(self._limit / self._plugins.tokens_per_block))
        layers = self._config.mapping.pp_layers(self._config.num_hidden_layers)
        pair = self._fixed("cross_kv", 2)  # keys and values; address of blocks and of scales; pool and place in it
        cache.cross_kv_cache_block_offsets, cache.host_cross_kv_cache_block_offsets = (
            _input(f"{place}cross_kv_cache_block_offsets", trt.int32, pools, self._batch, pair, blocks)
            for place in ("", "host_")
        )
        cache.host_cross_kv_cache_pool_pointers = _input("host_cross_kv_cache_pool_pointers", trt.int64, pools, pair)
        cache.host_cross_kv_cache_pool_mapping = _input(
            "host_cross_kv_cache_pool_mapping", trt.int32, self._fixed("cross_kv_layers", len(layers)), pair
        )

    def _flag(self, name: str) -> Tensor:
        return _input(name, trt.bool, self._fixed("flag", 1))

    def _fixed(self, name: str, size: int) -> Dimension:
        return name, [size] * len(self._batch[1])

    def _dynamic(self, name: str, least: int, largest: int) -> Dimension:
        return name, [[least, max(least, (largest + 1) // 2), largest]] * len(self._batch[1])


def sees_image(mask: Tensor, lengths: Tensor, last_token_ids: Tensor) -> Tensor:
    """Say which tokens read a cross-attended token of their own request.

    mask [T, C] bool or [B, S, C], lengths [B], last_token_ids [B] (tokens up to and with each request's last; not read
    for padded rows) -> [T, 1] or [B, S, 1] bool."""
    columns = _places(mask, mask.ndim() - 1)  # [C]
    if mask.ndim() == 2:
        tokens = unsqueeze(_places(mask, 0), 1)  # [T, 1]
        ended = tokens > unsqueeze(last_token_ids - 1, 0)  # [T, B]: whether a request's last token stands before
        request = reduce(ended.cast("int32"), trt.ReduceOperation.SUM, dim=-1)  # [T]
        own = unsqueeze(index_select(lengths, 0, request), 1)  # [T, 1]
    else:
        own = unsqueeze(unsqueeze(lengths, 1), 2)  # [B, 1, 1]
    read = op_and(mask, columns < own)
    return reduce(read.cast("int32"), trt.ReduceOperation.MAX, dim=-1, keepdim=True) > 0


def _places(x: Tensor, axis: int) -> Tensor:
    """Count along an axis of x: 0, 1, ... as [size of the axis] int32."""
    return arange(start=constant(int32_array(0)), end=shape(x, axis).cast("int32"), dtype="int32")


def _gate(gate: Parameter) -> Tensor:
    """Return tanh of a gate [1], computed in float32 and rounded once."""
    value = gate.value
    return tanh(value.cast("float32")).cast(value.dtype)


def _dimension(tensor: Tensor, axis: int) -> Dimension:
    """Return name and ranges of a dimension of an input that TensorRT-LLM declared."""
    profiles = tensor.profiles
    return profiles[0].dimension_names[axis], [[p.min[axis], p.opt[axis], p.max[axis]] for p in profiles]


def _input(name: str, dtype: Any, *dimensions: Dimension) -> Tensor:
    """Declare an input of the network."""
    sizes = [ranges[0] if isinstance(ranges[0], int) else -1 for _, ranges in dimensions]
    return Tensor(name=name, dtype=dtype, shape=sizes, dim_range=OrderedDict(dimensions))


MODEL_MAP.update(dict.fromkeys(ARCHITECTURES, NvlmForCausalLM))
