"""Says how the linear layers of a checkpoint are quantised: FP8 as compressed-tensors or NVIDIA's ModelOpt write it.

Both store `X.weight` as float8_e4m3fn beside `X.weight_scale`, whose product is the weight: one scale for the tensor,
or one for each row. Scales of activations (`X.input_scale`) and of KV caches are the runtime's, not the weights'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_trt.errors import ConfigError
from nvlm_trt.model.json_file import read_json_object

FP8_DTYPE = "F8_E4M3"
_MODELOPT_FILE = "hf_quant_config.json"
_KEYS = ("quantization_config", "compression_config")  # compressed-tensors wrote the second in 2024
_SECTIONS = ("", "llm_config", "text_config")
_REMEDY = "name the unquantised checkpoint, or one in FP8 of compressed-tensors or ModelOpt"


@dataclass(frozen=True)
class Fp8Scheme:
    """A scheme whose weights can be read. `activations`: static, dynamic or none, as the copy is meant to run."""

    method: str  # compressed-tensors or modelopt
    activations: str

    def __str__(self) -> str:
        return f"FP8 of {self.method}, activations {self.activations}"


def read_scheme(raw: Mapping[str, Any], directory: Path | None = None) -> Fp8Scheme | None:
    """Reads the scheme from config.json, or from ModelOpt's own file in `directory`; None: nothing is quantised.

    Raises ConfigError for a scheme that is not known."""
    for section in _SECTIONS:
        holder = raw.get(section) if section else raw
        for key in _KEYS:
            found = holder.get(key) if isinstance(holder, Mapping) else None
            if found is not None:
                return _scheme(found, f"{section}.{key}" if section else key)
    found = read_json_object(directory / _MODELOPT_FILE) if directory else None
    return None if found is None else _modelopt(found.get("quantization"), f"{_MODELOPT_FILE}: quantization")


def _scheme(found: object, where: str) -> Fp8Scheme:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where} is not an object; restore config.json from the checkpoint")
    method = found.get("quant_method", "compressed-tensors" if "config_groups" in found else None)
    if method == "modelopt":
        return _modelopt(found.get("quantization", found), where)
    if method != "compressed-tensors":
        raise ConfigError(f"{where}: weights quantised with {method!r} cannot be read; {_REMEDY}")
    try:
        return _compressed_tensors(found, where)
    except (AttributeError, TypeError):
        raise ConfigError(f"{where} is not of compressed-tensors; restore config.json from the checkpoint") from None


def _modelopt(found: object, where: str) -> Fp8Scheme:
    algorithm = found.get("quant_algo") if isinstance(found, Mapping) else None
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        raise ConfigError(f"{where}: ModelOpt's quant_algo {algorithm!r} cannot be read, only FP8 can; {_REMEDY}")
    return Fp8Scheme("modelopt", "static" if algorithm == "FP8" else "dynamic")


def _compressed_tensors(found: Mapping[str, Any], where: str) -> Fp8Scheme:
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ConfigError(f"{where} has no config_groups; restore config.json from the checkpoint")
    sparsity = found.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ConfigError(f"{where}: sparse weights ({sparsity['format']}) cannot be read; {_REMEDY}")
    kinds = set()
    for name, group in groups.items():
        layout = group.get("format") or found.get("format")
        if layout not in ("float-quantized", "naive-quantized"):
            raise ConfigError(f"{where}: weights in the format {layout!r} cannot be read; {_REMEDY}")
        weights = group.get("weights") or {}
        expected = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        differing = [key for key, value in expected.items() if weights.get(key, value) != value]
        if weights.get("num_bits") != 8 or differing or weights.get("strategy") not in ("tensor", "channel"):
            raise ConfigError(
                f"{where}.config_groups.{name}: weights of {weights.get('num_bits')} bits, type "
                f"{weights.get('type')!r}, strategy {weights.get('strategy')!r} cannot be read; {_REMEDY}"
            )
        activations = group.get("input_activations")
        kinds.add("none" if activations is None else "dynamic" if activations.get("dynamic") else "static")
    return Fp8Scheme("compressed-tensors", " and ".join(sorted(kinds)))
