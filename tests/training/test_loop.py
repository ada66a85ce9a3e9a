"""Training loops that are cut and resumed give the weights of uncut ones."""

import csv
import itertools

import pytest
import torch
from torch import nn

from training.loop import train
from training.schedule import Schedule, rate_factor
from training.state import load_weights, trained_steps

SCHEDULE = Schedule(steps=24, matrix_rate=0.02, other_rate=0.02, warmup=4, log_every=2, save_every=5, evaluate_every=6)


class CutError(Exception):
    pass


def run(directory, cut_at=None):
    torch.manual_seed(0)
    first = nn.Linear(6, 8)
    module = nn.Sequential(first, nn.RMSNorm(8), nn.Linear(8, 1))

    def losses_at(step):
        if step == cut_at:
            raise CutError
        random = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=random)
        yield {"loss": (module(x)[:, 0] - x.sum(1)).square().mean()}

    train(module, SCHEDULE, directory, losses_at, lambda: {"norm": float(first.weight.detach().norm())})
    return load_weights(directory / "state.safetensors")


def rows(path):
    """The rows of a CSV file without the column of seconds."""
    with path.open(newline="") as file:
        return [[cell for name, cell in row.items() if name != "seconds"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("cut_at", [1, 7, 15, 23])
def test_a_cut_run_resumes_bit_for_bit(tmp_path, cut_at):
    whole = run(tmp_path / "whole")
    with pytest.raises(CutError):
        run(tmp_path / "cut", cut_at)
    resumed = run(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rows(tmp_path / "whole" / "evaluation.csv") == rows(tmp_path / "cut" / "evaluation.csv")
    assert [row[0] for row in rows(tmp_path / "cut" / "log.csv")] == [str(step) for step in range(2, 25, 2)]


def test_a_cut_while_saving_keeps_the_last_state(tmp_path, monkeypatch):
    with pytest.raises(CutError):
        run(tmp_path, cut_at=7)
    (tmp_path / "state.partial").write_bytes(b"half a file")
    assert trained_steps(tmp_path / "state.safetensors") == 5
    assert all(torch.isfinite(tensor).all() for tensor in run(tmp_path).values())


def test_training_lowers_the_loss(tmp_path):
    run(tmp_path)
    log = [float(row[1]) for row in rows(tmp_path / "log.csv")]
    assert log[-1] < 0.9 * log[0]


def test_rates_rise_stay_and_fall():
    factors = [rate_factor(step, SCHEDULE) for step in range(SCHEDULE.steps)]
    assert factors[0] == 0.25
    assert factors[3:12] == [1.0] * 9
    assert all(a > b for a, b in itertools.pairwise(factors[12:]))
    assert factors[-1] == pytest.approx(0.02, abs=0.09)
