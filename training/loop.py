"""The training loop that every stage shares: Muon and AdamW, a schedule, a CSV log, and a state to resume from.

Step k draws its data from (seed, k) alone, so a run that was cut goes on as if it had not been.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PROJECTOR = "mlp1."
Losses = dict[str, Tensor]  # by name; "loss" is what is minimised


@dataclass(frozen=True)
class Stage:
    """How long and how fast. Learning rates peak after `warmup` steps, stay for 40 % and fall to 2 % linearly."""

    steps: int
    matrix_rate: float  # Muon, for the layers' matrices
    other_rate: float  # AdamW, for embeddings, norms, biases, gates and the head
    projector_rate: float = 1.0  # of matrix_rate; at 1 a hundred steps undo what alignment has taught it
    warmup: int = 50
    weight_decay: float = 0.01
    log_every: int = 25
    save_every: int = 200
    evaluate_every: int = 500


def optimizers(module: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon turns matrices between hidden states; what is looked up or scales a channel wants AdamW."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices: list[nn.Parameter] = []
    projector: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.ndim != 2 or "embed" in name or "head" in name:
            others.append(parameter)
        else:
            (projector if name.startswith(_PROJECTOR) else matrices).append(parameter)
    groups = [
        {"params": group, "lr": rate}
        for group, rate in ((matrices, stage.matrix_rate), (projector, stage.matrix_rate * stage.projector_rate))
        if group
    ]
    return [
        torch.optim.Muon(
            groups,
            weight_decay=stage.weight_decay,
            momentum=0.95,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=stage.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, stage: Stage) -> float:
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return max(0.02, 1 - max(0.0, done - 0.4) / 0.6)


def train(
    module: nn.Module,
    stage: Stage,
    directory: Path,
    losses_at: Callable[[int], Iterable[Losses]],
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Train `module` in place up to `stage.steps`, from the state in `directory` if there is one.

    `losses_at(step)` yields the losses of the step's micro-batches; their gradients add up. `directory` gets
    state.safetensors (weights, optimiser, step), log.csv and evaluation.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    optims = optimizers(module, stage)
    peaks = [[group["lr"] for group in optim.param_groups] for optim in optims]
    start = load_state(directory / "state.safetensors", module, optims)
    log = _Log(directory / "log.csv", start)
    results = _Log(directory / "evaluation.csv", start)
    began = time.monotonic()
    module.train()
    for step in range(start, stage.steps):
        factor = rate_factor(step, stage)
        for optim, rates in zip(optims, peaks, strict=True):
            for group, rate in zip(optim.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optim.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        for losses in losses_at(step):
            losses["loss"].backward()
            for name, value in losses.items():
                values[name] = values.get(name, 0.0) + float(value.detach())
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optim in optims:
            optim.step()
        log.average(values)
        done = step + 1
        if done % stage.log_every == 0:
            log.write(done, {"seconds": time.monotonic() - began, **log.averages})
        if done % stage.save_every == 0 or done == stage.steps:
            save_state(directory / "state.safetensors", module, optims, done)
        if done % stage.evaluate_every == 0 or done == stage.steps:
            module.eval()
            results.write(done, evaluate())
            module.train()
    module.eval()


class _Log:
    """A CSV file that grows by a row; rows of a run that was cut, from `start` on, are dropped when it resumes."""

    def __init__(self, path: Path, start: int) -> None:
        self.averages: dict[str, float] = {}
        self._path = path
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            kept = rows[:1] + [row for row in rows[1:] if row and int(row[0]) <= start]
            with path.open("w", newline="") as file:
                csv.writer(file).writerows(kept if start else [])

    def average(self, values: dict[str, float]) -> None:
        """Running means over about 25 steps."""
        for name, value in values.items():
            self.averages[name] = self.averages.get(name, value) * 0.96 + value * 0.04

    def write(self, step: int, values: dict[str, float]) -> None:
        new = not self._path.exists() or not self._path.stat().st_size
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.5g}" for value in values.values())])
        print(f"{self._path.parent.name} {step}", *(f"{k} {v:.4g}" for k, v in values.items()), flush=True)


def save_state(path: Path, module: nn.Module, optims: list[torch.optim.Optimizer], step: int) -> None:
    """Weights, optimiser state and step in one safetensors file, written beside `path` and renamed."""
    tensors = {f"weights.{name}": tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    for number, optim in enumerate(optims):
        for index, values in optim.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = torch.as_tensor(value).contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"step": str(step)})
    partial.replace(path)


def load_state(path: Path, module: nn.Module, optims: list[torch.optim.Optimizer]) -> int:
    """Restore what `save_state` wrote; returns the step, 0 if there is no state."""
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
    """The weights in a file that `save_state` wrote."""
    tensors = load_file(path)
    return {key.removeprefix("weights."): tensors[key] for key in tensors if key.startswith("weights.")}


def trained_steps(path: Path) -> int:
    """How far a state is; 0 if there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
