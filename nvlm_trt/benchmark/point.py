"""Holds the measurement of one load."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nvlm_trt.benchmark.load import Load
from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.triton_metrics import CounterSnapshot

Ending = Literal["complete", "interrupted", "failed"]


@dataclass(frozen=True)
class ClientUse:
    """Holds the CPU time that the client used while it measured."""

    wall_s: float
    load_cpu_s: list[float]  # per load process
    parent_cpu_s: float
    cores: int

    @property
    def busiest(self) -> float:
        """Computes the share of one core that the busiest process used: at 1, the process cannot keep up."""
        return max([*self.load_cpu_s, self.parent_cpu_s]) / self.wall_s if self.wall_s else 0.0

    @property
    def share(self) -> float:
        """Computes the share of this machine's cores that all processes used."""
        return (sum(self.load_cpu_s) + self.parent_cpu_s) / (self.wall_s * self.cores) if self.wall_s else 0.0


@dataclass
class Point:
    """Holds one measured load. The records include the warm-up and the requests that were open at an early end."""

    load: Load
    status: Ending = "complete"
    started: float = 0.0  # `clock`
    records: list[Record] = field(default_factory=list)
    server: CounterSnapshot | None = None  # counted by the server during the whole load, warm-up included
    client: ClientUse | None = None
