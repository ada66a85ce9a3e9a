"""Reads a LoRA adapter as PEFT saves it, and adds it to the weights of its base while these are read.

An update is scaling * B @ A, in float32, as PEFT merges it into a base that was loaded in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvlm_trt.checkpoint.safetensors_file import FloatArray, SafetensorsFile
from nvlm_trt.checkpoint.stored_names import layout_name
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.errors import CheckpointError, ConfigError
from nvlm_trt.model.json_file import read_json_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

# Keys of adapter_config.json that change the weights, with the values that are read (absent keys mean the first).
_MATHS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
}
# These start from weights split off the base, so the adapter does not belong to the base as it was published.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.default)?(?:\.weight)?")
# Rows whose updates are computed together. A BLAS may add up in another order for another number of rows: with blocks
# that begin at multiples of this, the bits of a row do not depend on which rows are read with it.
_BLOCK_ROWS = 64


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter adds to one matrix [rows, columns]: scaling * up @ down, up [rows, r], down [r, columns]."""

    file: SafetensorsFile
    up: str
    down: str
    scaling: float
    transposed: bool = False  # of an embedding: stored as up [r, rows]^T, down [columns, r]^T

    @property
    def shape(self) -> tuple[int, int]:
        up, down = (self.file.records[name].shape for name in (self.up, self.down))
        return (up[1], down[0]) if self.transposed else (up[0], down[1])

    @property
    def ranks(self) -> tuple[int, int]:
        """The rank that each of the two factors has."""
        up, down = (self.file.records[name].shape for name in (self.up, self.down))
        return (up[0], down[1]) if self.transposed else (up[1], down[0])

    def add_to(self, rows: FloatArray, start: int) -> None:
        """Adds rows [start, start + len(rows)) of the update to `rows` [n, columns]."""
        stop = start + len(rows)
        up, down = self.file.load(self.up), self.file.load(self.down)
        if self.transposed:
            up, down = np.ascontiguousarray(up.T), np.ascontiguousarray(down.T)
        for first in range(start // _BLOCK_ROWS * _BLOCK_ROWS, stop, _BLOCK_ROWS):
            update = up[first : first + _BLOCK_ROWS] @ down
            update *= np.float32(self.scaling)
            begin, end = max(first, start), min(first + len(update), stop)
            rows[begin - start : end - start] += update[begin - first : end - first]


class LoraAdapter(ClosedOnExit):
    """An open adapter: `updates` by the name of the weight that each changes, `replaced` weights that were trained
    whole. A context manager."""

    def __init__(self, directory: Path | str) -> None:
        """Raises ConfigError for an adapter that does something else than LoRA, CheckpointError for its weights."""
        self.directory = Path(directory)
        self._config = self._read_config()
        if not (self.directory / ADAPTER_FILE).exists() and (self.directory / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{self.directory} has its weights in adapter_model.bin, a format that can run code when it is read; "
                "save the adapter with safe_serialization=True"
            )
        self.file = SafetensorsFile(self.directory / ADAPTER_FILE, layout_name)
        try:
            self.replaced, parts = self._sorted_tensors()
            self.updates = {f"{module}.weight": self._update(module, names) for module, names in parts.items()}
        except BaseException:
            self.file.close()
            raise

    @property
    def base(self) -> str | None:
        """The name that the adapter gives its base."""
        return self._config.get("base_model_name_or_path")

    @property
    def digest(self) -> str:
        """Hashes (sha256) what the adapter changes: names, scalings and data."""
        digest = hashlib.sha256()
        scalings = {name: update.scaling for name, update in sorted(self.updates.items())}
        digest.update(json.dumps(scalings, sort_keys=True, allow_nan=False).encode())
        for name, record in sorted(self.file.records.items()):
            digest.update(f"\n{name} {record.dtype} {record.shape}\n".encode())
            for block in self.file.blocks(record):
                digest.update(block)
        return digest.hexdigest()

    def changes(self, name: str) -> bool:
        """Whether the adapter changes a weight."""
        return name in self.updates or name in self.replaced

    def check_base(self, stored: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless every tensor of the adapter fits a weight of the base, of which `stored` are
        the shapes by name, dummy heads included."""
        changed = {name: update.shape for name, update in self.updates.items()}
        for name, shape in {**changed, **{name: self.file.records[name].shape for name in self.replaced}}.items():
            if name not in stored:
                raise CheckpointError(f"adapter {self.directory} changes {name}, which {self._other_base}")
            if shape != stored[name]:
                raise CheckpointError(
                    f"adapter {self.directory} changes {name} of shape {list(shape)}, the checkpoint's has "
                    f"{list(stored[name])}: it is of another base; {self._remedy}"
                )

    def close(self) -> None:
        self.file.close()

    @property
    def _other_base(self) -> str:
        return f"this checkpoint does not have: it is of another base; {self._remedy}"

    @property
    def _remedy(self) -> str:
        return f"name its base as --checkpoint ({ADAPTER_CONFIG}: {self.base!r})"

    def _read_config(self) -> dict[str, Any]:
        path = self.directory / ADAPTER_CONFIG
        config = read_json_object(path)
        if config is None:
            raise ConfigError(f"no {ADAPTER_CONFIG} in {self.directory}; name the folder of a LoRA adapter of PEFT")
        for key, allowed in _MATHS.items():
            if config.get(key, allowed[0]) not in allowed:
                raise ConfigError(
                    f"{path}: {key} = {config[key]!r} is not supported; merge the adapter with PEFT: "
                    "model.merge_and_unload().save_pretrained(...)"
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise ConfigError(
                f"{path}: init_lora_weights = {start!r} has changed the base too; convert the adapter with PEFT: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        return config

    def _sorted_tensors(self) -> tuple[tuple[str, ...], dict[str, dict[str, str]]]:
        """Returns the weights that are replaced whole, and of each other module: part -> tensor name."""
        replaced: list[str] = []
        parts: dict[str, dict[str, str]] = {}
        for name in tuple(self.file.records):
            match = _PART.fullmatch(name)
            if match:
                parts.setdefault(match["module"], {})[match["part"]] = name
            else:
                # the embeddings, which PEFT saves too if it trains them: the base of their own update
                weight = name.replace(".base_layer.", ".")
                self.file.records[weight] = self.file.records.pop(name)
                replaced.append(weight)
        return tuple(replaced), parts

    def _update(self, module: str, names: Mapping[str, str]) -> LowRankUpdate:
        embedding = "embedding_A" in names
        down, up = ("embedding_B", "embedding_A") if embedding else ("A", "B")
        if set(names) != {down, up}:
            raise CheckpointError(
                f"{self.file.path} has {', '.join(sorted(names.values()))} alone; an update has two parts, A and B"
            )
        update = LowRankUpdate(self.file, names[up], names[down], 1.0, transposed=embedding)
        if any(len(self.file.records[name].shape) != 2 for name in names.values()) or len(set(update.ranks)) != 1:
            raise CheckpointError(f"{self.file.path}: the two parts of {module} do not fit; save the adapter again")
        return LowRankUpdate(
            self.file, names[up], names[down], self._scaling(module, update.ranks[0]), transposed=embedding
        )

    def _scaling(self, module: str, rank: int) -> float:
        """Computes alpha / r, or alpha / sqrt(r); a pattern's alpha counts for the modules whose names end with it."""
        config = self._config
        alpha = config.get("lora_alpha", 8)
        try:
            for pattern, value in (config.get("alpha_pattern") or {}).items():
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    alpha = value
                    break
            return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
        except (AttributeError, TypeError, re.error, ZeroDivisionError):
            raise ConfigError(
                f"{self.directory / ADAPTER_CONFIG}: lora_alpha or alpha_pattern of {module} is not a number; restore "
                "the file from the adapter"
            ) from None
