"""Spreads the ranks of an engine over nodes, once for each replica."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_trt.deployment.deployed_engine import DeployedEngine
from nvlm_trt.errors import EngineError


@dataclass(frozen=True)
class Layout:
    """Says how many servers there are, and how many nodes each takes."""

    replicas: int
    nodes: int  # of one replica
    ranks_per_node: int  # and GPUs, on a GPU

    @classmethod
    def of(cls, engine: DeployedEngine, replicas: int, nodes: int | None, gpus_per_node: int) -> Layout:
        """Lay out the ranks; without `nodes`, on as few nodes as hold them. Raises EngineError if they do not fit."""
        ranks, needs = engine.ranks, engine.needs
        fitting = [count for count in range(1, ranks + 1) if ranks % count == 0 and ranks // count <= gpus_per_node]
        nodes = fitting[0] if nodes is None else nodes
        if nodes not in fitting and ranks == 1:
            raise EngineError(f"engine {engine.path} runs on one node, not on {nodes}; --replicas makes more servers")
        if nodes not in fitting:
            raise EngineError(
                f"engine {engine.path} has {ranks} ranks (tp {needs.tp} x pp {needs.pp}), which {nodes} nodes of "
                f"{gpus_per_node} GPUs do not hold evenly; choose --nodes {_listed(fitting)}"
            )
        return cls(replicas, nodes, engine.ranks // nodes)


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
