"""Small models that four ranks can share, the oracle's answers, and the oracle with the quantisation of the ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from stages import tiny_config
from torch import Tensor, nn

from nvlm_trt.builders.quantization import int8
from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput
from nvlm_trt.builders.quantization.formats import Recipe, quantised
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm_checkpoint import LlmQuantization, llm_quantization, write_llm_checkpoint
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import read_config
from nvlm_trt.model.precision import COMPONENTS
from nvlm_trt.progress import no_progress
from nvlm_trt.reference.model import ReferenceModel

SPLITS = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)]  # tp, pp
PRECISIONS = ("bf16", "fp8", "int8", "int8-weight-only", "int4-weight-only")
MAX_ENCODER_LEN = 40
ALPHA = 0.5

# 8 query heads share 2 key/value heads, which 4 ranks have to duplicate; 4 ranks divide neither the vocabulary nor,
# in multiples of 64, the FFN. With blocks before layers 0 and 3, the second of two stages begins with an LLM layer.
VISION = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "image_size": 28}
_LLM = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 32,
    "intermediate_size": 320,
    "vocab_size": 514,
}
CONFIGS: dict[str, NvlmConfig] = {
    "D": tiny_config("D", vision=VISION, llm=_LLM),
    "X": tiny_config("X", vision=VISION, llm=_LLM, cross_attention={"interval": 3}),
    "H": tiny_config("H", vision=VISION, llm=_LLM, cross_attention={"interval": 3}),
}
VARIANTS: dict[str, NvlmConfig] = {
    "Llama, tied": tiny_config(
        "D", vision=VISION, llm={**_LLM, "family": "llama", "tie_word_embeddings": True, "num_kv_heads": 4}
    ),
    "X without FFN, with qk-norm": tiny_config(
        "X", vision=VISION, llm=_LLM, cross_attention={"interval": 3, "ffn": False, "qk_norm": True}
    ),
    "H over Llama, heads wider than the model": tiny_config(
        "H", vision=VISION, llm={**_LLM, "family": "llama", "head_dim": 48}, cross_attention={"interval": 1}
    ),
}


@dataclass(frozen=True)
class Prompt:
    """What the LLM reads: ids [S] with image placeholders, the image embeddings [M, hidden], cross-attended tokens
    [C, hidden] and ranges [S, 2] of them."""

    ids: Tensor
    embeddings: Tensor | None
    encoder_output: Tensor | None
    ranges: Tensor | None

    @property
    def mask(self) -> Tensor | None:
        """[S, C], True where a token reads."""
        if self.ranges is None or self.encoder_output is None:
            return None
        tokens = torch.arange(len(self.encoder_output))
        return (tokens >= self.ranges[:, :1]) & (tokens < self.ranges[:, 1:])

    def table_ids(self, config: NvlmConfig) -> Tensor:
        """Return the ids with vocab_size + k in place of image placeholder k."""
        places = torch.eq(self.ids, config.image_token_id or 0)
        return torch.where(places, config.llm.vocab_size - 1 + places.cumsum(0), self.ids)


class SplitModel:
    """A random checkpoint, its oracle in float64, one prompt, and a calibration on this prompt."""

    def __init__(self, directory: Path, config: NvlmConfig) -> None:
        write_random_checkpoint(directory, config, seed=3)
        self.checkpoint = directory
        self.config = read_config(directory)
        self.reference = ReferenceModel.from_checkpoint(directory, torch.float64)
        self.prompt = _prompt(self.config)
        self.calibration = _calibrate(self.reference, self.prompt)

    def quantization(
        self, precision: str, mapping: Mapping, cross: str | None = None, alpha: float = ALPHA
    ) -> LlmQuantization:
        precisions = dict.fromkeys(COMPONENTS, "bf16")
        precisions |= {"decoder": precision, "cross_attention": cross or precision}
        return llm_quantization(self.config, mapping, self.recipe(precisions, alpha))

    def recipe(self, precisions: dict[str, str], alpha: float = ALPHA) -> Recipe:
        with Checkpoint.open(self.checkpoint) as checkpoint:
            return quantised(checkpoint, precisions, self.calibration, alpha)

    def write(self, directory: Path, quantization: LlmQuantization, mapping: Mapping, dtype: str = "bf16") -> None:
        write_llm_checkpoint(
            self.checkpoint, self.config, directory, quantization, mapping, MAX_ENCODER_LEN, no_progress, dtype=dtype
        )

    def logits(self, quantization: LlmQuantization | None = None, blocks_ffn: bool = True) -> Tensor:
        """Compute the oracle's logits [S, vocab], with the numbers of FP8 or INT8 in place of exact ones."""
        if quantization is None or quantization.calibration is None:
            return answer(self.reference, self.prompt)
        return answer(_fake_quantised(self.reference, quantization, blocks_ffn), self.prompt)


def answer(model: ReferenceModel, prompt: Prompt) -> Tensor:
    cross_kv = ranges = None
    if prompt.encoder_output is not None and prompt.ranges is not None:
        cross_kv, ranges = model.language_model.cross_kv(prompt.encoder_output), prompt.ranges[None]
    return model(prompt.ids[None], prompt.embeddings, cross_kv, ranges)[0][0]


def _prompt(config: NvlmConfig) -> Prompt:
    """Twenty tokens: text that reads nothing, two tile tags, then everything."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 250, (20,), generator=generator)
    embeddings = encoder_output = ranges = None
    if config.architecture != "X":
        ids[3:7] = config.image_token_id or 0
        embeddings = torch.randn(4, config.llm.hidden_size, generator=generator, dtype=torch.float64)
    if config.architecture != "D":
        encoder_output = torch.randn(9, config.llm.hidden_size, generator=generator, dtype=torch.float64)
        ranges = torch.tensor([(0, 0)] * 8 + [(0, 4)] * 3 + [(4, 9)] * 3 + [(0, 9)] * 6)
    return Prompt(ids, embeddings, encoder_output, ranges)


def _calibrate(model: ReferenceModel, prompt: Prompt) -> Calibration:
    channels: dict[str, Tensor] = {}

    def observe(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        channels[name] = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).abs().amax(0)

    hooks = [linear.register_forward_pre_hook(partial(observe, name)) for name, linear in _linears(model)]
    answer(model, prompt)
    for hook in hooks:
        hook.remove()
    linears = {}
    for name, largest in channels.items():
        abs_max = float(largest.max())
        calibrated = name.replace("self_attn.q_proj", "self_attn.qkv_proj")
        linears[calibrated] = LinearInput(abs_max=abs_max, clip=0.8 * abs_max, channels=largest.tolist())
    return Calibration(checkpoint_digest="of the test", samples={}, linears=linears)


def _linears(model: ReferenceModel) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("language_model.") and "lm_head" not in name:
            yield name, module


def _fake_quantised(reference: ReferenceModel, quantization: LlmQuantization, blocks_ffn: bool) -> ReferenceModel:
    """Quantise and restore weights and inputs of the decoder, and of the blocks' FFN with `blocks_ffn`."""
    model = copy.deepcopy(reference)
    for name, parameter in model.named_parameters():
        if name in quantization.factors:
            parameter.copy_(torch.from_numpy(quantization.factors[name].apply(parameter.float().numpy())))
    quantised = {
        name: linear
        for name, linear in _linears(model)
        if "cross_layers" not in name or (blocks_ffn and ".mlp." in name)
    }
    scales = {name: _fp8_scale(model, name) for name in quantised}
    for name, linear in quantised.items():
        assert quantization.calibration is not None
        observed = quantization.calibration.linears[_observed(name)]
        if quantization.algo == "FP8":
            linear.weight.copy_(_e4m3(linear.weight, scales[name]))
            scale = float(np.float32(observed.abs_max / 448))
            linear.register_forward_pre_hook(lambda _, inputs, scale=scale: (_e4m3(inputs[0], scale),))
        else:
            weight = linear.weight.float().numpy()
            steps = int8.search_scales(weight)
            linear.weight.copy_(torch.from_numpy(int8.quantize(weight, steps) * steps[:, None].astype(np.float64)))
            scale = float(np.float32(observed.clip / 127))
            linear.register_forward_pre_hook(
                lambda _, inputs, scale=scale: ((inputs[0] / scale).round().clamp(-128, 127) * scale,)
            )
    weights = {f"{name}.weight" for name in quantised}
    for name, parameter in model.named_parameters():
        if name not in weights:
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def _observed(name: str) -> str:
    for part in "qkv":
        name = name.replace(f"self_attn.{part}_proj", "self_attn.qkv_proj")
    return name


def _fp8_scale(model: ReferenceModel, name: str) -> float:
    """One scale for q, k and v, and one for gate_proj and up_proj."""
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
    parent, _, leaf = name.rpartition(".")
    group = next(group for group in groups if leaf in group)
    largest = max(float(model.get_parameter(f"{parent}.{part}.weight").abs().max()) for part in group)
    return float(np.float32(largest) / np.float32(448))


def _e4m3(x: Tensor, scale: float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
