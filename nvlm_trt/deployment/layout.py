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
        built = f"engine {engine.path} has {engine.ranks} rank{'s' * (engine.ranks > 1)} (tp {engine.tp} x pp {engine.pp})"
        fitting = [n for n in range(1, engine.ranks + 1) if engine.ranks % n == 0 and engine.ranks // n <= gpus_per_node]
        nodes = fitting[0] if nodes is None else nodes
        if nodes not in fitting:
            remedy = "use --replicas for more servers" if engine.ranks == 1 else f"choose --nodes {_listed(fitting)}"
            raise EngineError(
                f"{built}, which do not spread evenly over {nodes} nodes of {gpus_per_node} GPUs; {remedy}"
                if engine.ranks > 1
                else f"{built}, which runs on one node, not on {nodes}; {remedy}"
            )
        return cls(replicas, nodes, engine.ranks // nodes)


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
