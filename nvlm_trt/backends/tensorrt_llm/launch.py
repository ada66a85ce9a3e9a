"""Finds out which rank of how many this process is, from the environment that mpirun or srun gives it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_trt.errors import EngineError

# (number of ranks, this rank): of Open MPI, of MPICH and other users of PMI, of a step that srun started
_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@dataclass(frozen=True)
class Launch:
    """One process of a launch."""

    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the environment. A process that nobody launched with others is rank 0 of 1.

        Raises EngineError for numbers that are none."""
        for size_name, rank_name in _VARIABLES:
            if size_name in environment:
                size, rank = environment[size_name], environment.get(rank_name, "")
                if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
                    raise EngineError(
                        f"{size_name}={size} and {rank_name}={rank} are not a rank of a launch; unset both, or start "
                        "the process by mpirun or srun"
                    )
                return cls(int(size), int(rank))
        return cls()

    def check(self, name: str, tp: int, pp: int) -> None:
        """Check that an engine of tp * pp ranks can run. Raises EngineError; `name` names the engine."""
        ranks = tp * pp
        if self.size == ranks:
            return
        built = f"{name} was built for {ranks} ranks (tp {tp} x pp {pp})"
        remedy = "start it as `nvlm-trt deploy` writes it" if ranks > 1 else "start it without mpirun"
        if self.size < ranks:
            raise EngineError(f"{built}, and {ranks - self.size} of them are missing from this launch; {remedy}")
        raise EngineError(
            f"{built}, and this launch has {self.size}; {remedy}, or build one with --tp and --pp whose product is "
            f"{self.size}"
        )
