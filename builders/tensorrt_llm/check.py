"""Checks a checkpoint of TensorRT-LLM more strictly than its loader, which takes extra names and other dtypes.

Imports nothing that only a build needs: a container that goes on with a checkpoint lacks the extra `build`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from nvlm_trt import strict_json
from nvlm_trt.bounded_file import CONFIG_BYTES, read_bounded
from nvlm_trt.builders.tensorrt_llm.layout import (
    CONFIG_DTYPES,
    CONFIG_FILE,
    Layout,
    checkpoint_config,
    rank_file,
    rank_layout,
)
from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm.quantization import ALGORITHMS, LlmQuantization
from nvlm_trt.checkpoint.safetensors_file import SafetensorsFile
from nvlm_trt.engine import JOURNAL
from nvlm_trt.errors import CheckpointError, EngineError
from nvlm_trt.model.config import NvlmConfig

_REMEDY = "write the checkpoint again"
_SCALES = ("scaling_factor", "prequant_scaling_factor")


def check_llm_checkpoint(directory: Path, config: NvlmConfig) -> None:
    """Compare a directory with what `write_llm_checkpoint` writes for `config`, by all names, shapes and dtypes, by
    every key of config.json, and by the values of the scales. Reads no weight.

    Raises EngineError, which names the file and the key or tensor."""
    if (directory / JOURNAL).exists():
        raise EngineError(f"{directory} is not finished; run the build that writes it again, which goes on")
    path = directory / CONFIG_FILE
    settings = _read_config(path)
    mapping, quantization, max_encoder_len, dtype = _choices(path, settings, config)
    expected = checkpoint_config(config, mapping, quantization, max_encoder_len, dtype)
    _compare_config(path, settings, expected)
    files = {rank_file(rank) for rank in range(mapping.world_size)}
    for name in sorted(found.name for found in directory.glob("rank*.safetensors") if found.name not in files):
        raise EngineError(f"{directory / name} is of no rank of {mapping.tp} x {mapping.pp} GPUs; remove it")
    for rank in range(mapping.world_size):
        _check_rank(directory / rank_file(rank), rank_layout(config, mapping, quantization, rank, dtype))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = strict_json.loads(read_bounded(path, CONFIG_BYTES))
    except OSError as error:
        raise EngineError(f"cannot read {path} ({error.strerror}); {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path} is not JSON ({error}); {_REMEDY}") from None
    if not isinstance(settings, dict):
        raise EngineError(f"{path} does not hold a JSON object; {_REMEDY}")
    return settings


def _choices(path: Path, settings: dict[str, Any], config: NvlmConfig) -> tuple[Mapping, LlmQuantization, int, str]:
    """Read what the writer was free to choose: split, quantisation, limit of cross-attended tokens, and dtype."""
    shared = settings.get("mapping")
    tp, pp = (shared.get(key) if isinstance(shared, dict) else None for key in ("tp_size", "pp_size"))
    if type(tp) is not int or type(pp) is not int or min(tp, pp) < 1:
        raise EngineError(f"{path}: mapping has no tp_size and pp_size of 1 or more; {_REMEDY}")
    dtype = next((ours for ours, theirs in CONFIG_DTYPES.items() if theirs == settings.get("dtype")), None)
    if dtype is None:
        raise EngineError(f"{path}: dtype is not {' or '.join(CONFIG_DTYPES.values())}; {_REMEDY}")
    length = settings.get("max_encoder_input_len", 0)
    if type(length) is not int or length < bool(config.cross_layers):
        raise EngineError(f"{path}: max_encoder_input_len is not a number of tokens; {_REMEDY}")
    return Mapping(tp, pp), _quantization(path, settings.get("quantization"), config), length, dtype


def _quantization(path: Path, section: Any, config: NvlmConfig) -> LlmQuantization:
    if not isinstance(section, dict):
        raise EngineError(f"{path} has no quantization; {_REMEDY}")
    algo, kv_cache, excluded = (section.get(key) for key in ("quant_algo", "kv_cache_quant_algo", "exclude_modules"))
    if (algo, kv_cache) not in [(None, None), (None, "FP8"), *ALGORITHMS.values(), ("FP8", None)]:
        raise EngineError(f"{path}: quant_algo {algo!r} with kv_cache_quant_algo {kv_cache!r} is not ours; {_REMEDY}")
    always = LlmQuantization().excluded(config)
    if not isinstance(excluded, list) or tuple(excluded[: len(always)]) != always:
        raise EngineError(f"{path}: exclude_modules does not begin with {', '.join(always)}; {_REMEDY}")
    if not all(isinstance(pattern, str) for pattern in excluded):
        raise EngineError(f"{path}: exclude_modules is not a list of names; {_REMEDY}")
    return LlmQuantization(algo, kv_cache, tuple(excluded[len(always) :]))


def _compare_config(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if key not in found:
            raise EngineError(f"{path} has no {key}; {_REMEDY}")
        # true is 1 in Python, not in JSON
        if found[key] != value or isinstance(found[key], bool) != isinstance(value, bool):
            raise EngineError(f"{path}: {key} is {found[key]!r}, this model needs {value!r}; {_REMEDY}")
    for key in found:
        if key not in expected:
            raise EngineError(f"{path} has the key {key}, which is not ours; {_REMEDY}")


def _check_rank(path: Path, layout: Layout) -> None:
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        raise EngineError(f"a rank is missing or damaged: {error}") from None
    with contextlib.closing(file):
        for name, spec in layout.items():
            if name not in file.records:
                raise EngineError(f"{path} has no tensor {name}; {_REMEDY}")
            record = file.records[name]
            if record.shape != spec.shape:
                raise EngineError(
                    f"{path}: {name} has shape {list(record.shape)}, this rank needs {list(spec.shape)}; {_REMEDY}"
                )
            if record.dtype != spec.dtype:
                raise EngineError(f"{path}: {name} is {record.dtype}, this rank needs {spec.dtype}; {_REMEDY}")
        for name in file.records:
            if name not in layout:
                raise EngineError(f"{path} has the tensor {name}, which this rank does not use; {_REMEDY}")
        for name in layout:
            if name.endswith(_SCALES):
                _check_scale(file, name)


def _check_scale(file: SafetensorsFile, name: str) -> None:
    try:
        values = file.load(name)
    except CheckpointError as error:  # not finite
        raise EngineError(str(error)) from None
    if not (values > 0).all():
        place = int(np.argmin(values > 0))
        raise EngineError(f"{file.path}: {name} has {values[place]} at {place}, scales are positive; {_REMEDY}")
