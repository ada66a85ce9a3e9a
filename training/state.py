"""Saves the state of a training stage, and resumes from it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_state(path: Path, module: nn.Module, optims: list[torch.optim.Optimizer], step: int) -> None:
    """Writes weights, optimiser state and step to one safetensors file, beside `path`, and renames it."""
    tensors = {f"weights.{name}": tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    for number, optim in enumerate(optims):
        for index, values in optim.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = torch.as_tensor(value).contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"step": str(step)})
    partial.replace(path)


def load_state(path: Path, module: nn.Module, optims: list[torch.optim.Optimizer]) -> int:
    """Restores weights and optimisers from a state. Returns its step, 0 if there is no state."""
    if not path.exists():
        return 0
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optims]
    for key, tensor in load_file(path).items():
        section, _, name = key.partition(".")
        if section == "optimizer":
            number, index, value = name.split(".", 2)
            states[int(number)].setdefault(int(index), {})[value] = tensor
    module.load_state_dict(load_weights(path))
    for optim, state in zip(optims, states, strict=True):
        optim.load_state_dict({"state": state, "param_groups": optim.state_dict()["param_groups"]})
    return trained_steps(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Returns the weights of a state."""
    tensors = load_file(path)
    return {key.removeprefix("weights."): tensors[key] for key in tensors if key.startswith("weights.")}


def trained_steps(path: Path) -> int:
    """Returns the step of a state, 0 if there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
