"""Accounts for every stored tensor: each is in the layout of config.json, or it is skipped for a reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_trt.checkpoint.dummy_heads import padded_shape
from nvlm_trt.checkpoint.file_state import TensorRecord
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, IGNORED, LM_HEAD, checkpoint_layout
from nvlm_trt.model.quantised_source import FP8_DTYPE, Fp8Scheme

Records = Mapping[str, TensorRecord]

# scales of activations and of KV caches, which quantised copies carry for other runtimes
_OTHER_SCALES = re.compile(r".*\.(input|output|q|k|v|kv)_scale")


@dataclass(frozen=True)
class Misshapen:
    """A tensor of another shape than config.json asks for."""

    name: str
    stored: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Accounting:
    """How the tensors of a checkpoint compare with the layout of its config. Names are in the order of the layout."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[Misshapen, ...]
    skipped: tuple[str, ...]  # no NVLM model reads them


def account(config: NvlmConfig, records: Records, scheme: Fp8Scheme | None = None) -> Accounting:
    """Compares the tensors of all files with `checkpoint_layout`. `scheme`: how they are quantised, if they are."""
    layout = checkpoint_layout(config)
    padding = dummy_channels(config, records)
    expected = layout | ({LM_HEAD: layout[EMBEDDING]} if has_tied_copy(config, records) else {})
    scaled = [name for name in expected if scheme and name in records and records[name].dtype == FP8_DTYPE]
    scales = {scale_name(name): name for name in scaled}
    others = [name for name in records if name not in expected and name not in scales]
    skipped = [name for name in others if IGNORED.fullmatch(name) or (scheme and _OTHER_SCALES.fullmatch(name))]
    present = [(name, records[name].shape, shape) for name, shape in expected.items() if name in records]
    misshapen = [Misshapen(*entry) for entry in present if entry[1] != padded_shape(entry[0], entry[2], padding)]
    for name, weight in scales.items():
        rows = records[weight].shape[:1]
        if name in records and records[name].shape not in ((), (1,), rows, (*rows, 1)):
            misshapen.append(Misshapen(name, records[name].shape, (*rows, 1)))
    return Accounting(
        missing=tuple(name for name in (*layout, *scales) if name not in records),
        unexpected=tuple(name for name in others if name not in skipped),
        misshapen=tuple(misshapen),
        skipped=tuple(skipped),
    )


def scale_name(weight: str) -> str:
    """Returns the name of an FP8 weight's scales."""
    return f"{weight}_scale"


def has_tied_copy(config: NvlmConfig, records: Records) -> bool:
    """Whether the checkpoint stores lm_head beside the embeddings that it is tied to, as some exports do."""
    return config.llm.tie_word_embeddings and LM_HEAD in records


def dummy_channels(config: NvlmConfig, records: Records) -> int:
    """Counts the channels of the vision encoder's dummy heads, by the first layer's `proj`; 0 if it has none."""
    vision = config.vision
    record = records.get("vision_model.encoder.layers.0.attn.proj.weight")
    extra = record.shape[1] - vision.hidden_size if record and len(record.shape) == 2 else 0
    return extra if extra > 0 and extra % vision.head_dim == 0 else 0
