"""Gives TensorRT-LLM's own loader what it should refuse, and asks our config class the same."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from harness_models import oracle, write_ranks
from harness_network import load_model
from harness_signatures import METHODS, SIGNATURES, Signature, functions, members
from safetensors.torch import load_file, save_file


def refusals_of_tensors(checkpoint: Path, directory: Path) -> dict[str, str]:
    """Damage one tensor of every kind in a rank file. Return the loader's messages, by "missing NAME", "shape NAME"."""
    whole = write_ranks(checkpoint, directory / "whole", tp=2)
    tensors = load_file(whole / "rank1.safetensors")
    damages: dict[str, dict[str, torch.Tensor]] = {}
    for name in {re.sub(r"layers\.\d+", "", name): name for name in sorted(tensors)}.values():
        damages[f"missing {name}"] = {key: value for key, value in tensors.items() if key != name}
        damages[f"shape {name}"] = {**tensors, name: torch.cat([tensors[name], tensors[name]])}
    messages = {}
    damaged = directory / "damaged"
    damaged.mkdir()
    shutil.copy(whole / "config.json", damaged)
    for what, kept in damages.items():
        save_file(kept, damaged / "rank1.safetensors")
        try:
            load_model(damaged, 1)
            messages[what] = "accepted"
        except (RuntimeError, AssertionError) as error:
            messages[what] = str(error)
    return messages


def names_of_parameters(checkpoint: Path, directory: Path, tp: int, pp: int) -> list[tuple[set[str], set[str]]]:
    """Return for every rank the tensors that TensorRT-LLM's model asks for, and those of the writer's file."""
    ranks = write_ranks(checkpoint, directory, tp, pp)
    found = []
    for rank in range(tp * pp):
        model = load_model(ranks, rank)
        # parameters that TensorRT-LLM computes itself are buffers
        asked = {name for name, parameter in model.named_parameters() if not parameter.is_buffer}
        found.append((asked, set(load_file(ranks / f"rank{rank}.safetensors"))))
    return found


def refusal_of_config(checkpoint: Path, directory: Path, **changes: Any) -> str:
    """Change keys of config.json. Return the message of our config class."""
    from tensorrt_llm.models import PretrainedConfig

    ranks = write_ranks(checkpoint, directory)
    path = ranks / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    try:
        PretrainedConfig.from_json_file(str(path))
    except (TypeError, ValueError) as error:
        return str(error)
    return "accepted"


def config_survives_the_engine(checkpoint: Path, directory: Path) -> bool:
    """Return whether the config that the builder writes beside an engine is the one that the checkpoint had."""
    from tensorrt_llm.models import PretrainedConfig

    config = PretrainedConfig.from_json_file(str(write_ranks(checkpoint, directory) / "config.json"))
    written = json.loads(json.dumps(config.to_dict()))
    given = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    again = PretrainedConfig.from_dict(written)
    assert oracle(checkpoint).config.llm.num_heads == again.num_attention_heads
    return again.to_dict() == config.to_dict() and all(written[key] == given[key] for key in given.keys() - _COMPLETED)


_COMPLETED = {"mapping", "quantization", "qwen_type"}  # TensorRT-LLM adds keys to these


def signature_differences(checkpoint: Path, directory: Path) -> list[str]:
    """Compare the list of signatures with the package itself. Return what does not fit."""
    found = []
    entries = [(module, "", text) for module, text in SIGNATURES.items()]
    entries += [(module, owner, text) for (module, owner), text in METHODS.items()]
    for module, owner, text in entries:
        package = importlib.import_module(module)
        holder = getattr(package, owner) if owner else package
        for name, listed in functions(text):
            real = getattr(holder, name, None)
            if real is None:
                found.append(f"{module} {owner} {name} is not there")
            elif problem := _difference(listed, real, isinstance(inspect.getattr_static(holder, name), staticmethod)):
                found.append(f"{module} {owner} {name}: {problem}")
        for name, listed_members in members(text):
            found += [
                f"{name} has no {member}" for member in listed_members if not hasattr(getattr(holder, name), member)
            ]
    return found


def _difference(listed: Signature, real: Any, is_static: bool) -> str | None:
    try:
        parameters = inspect.signature(real.__init__ if inspect.isclass(real) else real).parameters
    except ValueError:  # a partial of a builtin
        return None
    is_method = inspect.isclass(real) or ("self" in parameters and not is_static)
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][is_method:]
    if missing := {*listed.positional, *listed.keyword_only} - parameters.keys():
        return f"has no {sorted(missing)}"
    required_first = [name for name in listed.positional if name in listed.required]
    if positional[: len(required_first)] != required_first:
        return f"takes {positional} in this order"
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = {p.name for p in parameters.values() if p.default is p.empty and p.kind not in kinds} - {"self"}
    return f"requires {sorted(required)}" if required != listed.required else None
