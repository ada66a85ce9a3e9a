"""Runs the training loop of every stage: Muon and AdamW, a schedule, a CSV log, and a state to resume from.

Step k draws its data from (seed, k) alone, so a run that was cut and resumed gives the weights of an uncut run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from training.csv_log import CsvLog
from training.schedule import Schedule, rate_factor
from training.state import load_state, save_state

_PROJECTOR = "mlp1."
Losses = dict[str, Tensor]  # by name; "loss" is minimised


def optimizers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon trains the matrices between hidden states, AdamW embeddings, heads, norms, biases and gates."""
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
        for group, rate in (
            (matrices, schedule.matrix_rate),
            (projector, schedule.matrix_rate * schedule.projector_rate),
        )
        if group
    ]
    return [
        torch.optim.Muon(
            groups,
            weight_decay=schedule.weight_decay,
            momentum=0.95,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=schedule.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    module: nn.Module,
    schedule: Schedule,
    directory: Path,
    losses_at: Callable[[int], Iterable[Losses]],
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Trains `module` in place up to `schedule.steps`, from the state in `directory` if there is one.

    `losses_at(step)` yields the losses of the step's micro-batches; their gradients add up. `directory` gets
    state.safetensors (weights, optimiser, step), log.csv and evaluation.csv.
    """
    directory.mkdir(parents=True, exist_ok=True)
    optims = optimizers(module, schedule)
    peaks = [[group["lr"] for group in optim.param_groups] for optim in optims]
    start = load_state(directory / "state.safetensors", module, optims)
    log = CsvLog(directory / "log.csv", start)
    results = CsvLog(directory / "evaluation.csv", start)
    began = time.monotonic()
    module.train()
    for step in range(start, schedule.steps):
        factor = rate_factor(step, schedule)
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
        if done % schedule.log_every == 0:
            log.write(done, {"seconds": time.monotonic() - began, **log.averages})
        if done % schedule.save_every == 0 or done == schedule.steps:
            save_state(directory / "state.safetensors", module, optims, done)
        if done % schedule.evaluate_every == 0 or done == schedule.steps:
            module.eval()
            results.write(done, evaluate())
            module.train()
    module.eval()
