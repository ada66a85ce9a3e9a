"""Runs the networks of all ranks: tensor-parallel ranks at once, meeting at collectives, and stages in order."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from conditional_network import ConditionalNetwork, run_network
from harness_network import ALLGATHER, ALLREDUCE, build_network, load_model, mark_collectives
from layer_reading import Array


class Ranks:
    """The ranks of a model, [stage][rank of the stage]."""

    def __init__(self, checkpoint: Path, tp: int, pp: int, prompt_table: int = 0, dtype: str = "float32") -> None:
        mark_collectives()
        self.stages = [
            [build_network(load_model(checkpoint, stage * tp + rank, dtype), prompt_table) for rank in range(tp)]
            for stage in range(pp)
        ]

    def run(self, feeds: Mapping[str, Array]) -> Array:
        """Run every stage on what of `feeds` it declares. Return the logits [B, vocab] of the first rank of the last
        stage; all ranks of a stage agree."""
        given = dict(feeds)
        for stage in self.stages:
            results = _run_together(stage, given)
            (name,) = results[0]
            for result in results[1:]:
                np.testing.assert_array_equal(result[name], results[0][name])
            given["hidden_states_input"] = results[0][name]
        assert name == "logits"
        return results[0][name]


def logits_of(checkpoint: Path, tp: int, prompt_table: int, feeds: Mapping[str, Array]) -> Array:
    """Load the ranks of one stage and run them."""
    return Ranks(checkpoint, tp, 1, prompt_table).run(feeds)


def _run_together(networks: Sequence[ConditionalNetwork], given: Mapping[str, Array]) -> list[dict[str, Array]]:
    meeting = _Meeting(len(networks))

    def run(rank: int) -> dict[str, Array]:
        network = networks[rank]
        feeds = {
            tensor.name: given[tensor.name] if tensor.name in given else np.zeros(tensor.shape, np.int64)
            for tensor in network.inputs
            if tensor.name in given or tensor.name == "all_reduce_workspace"  # which only the plugin reads
        }
        try:
            return run_network(network, feeds, lambda name, value: meeting.exchange(rank, name, value))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(len(networks)) as threads:
        return list(threads.map(run, range(len(networks))))


class _Meeting:
    """Where the ranks of a stage exchange values."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks)
        self._values: list[Array | None] = [None] * ranks
        self._names: list[str] = [""] * ranks

    def abort(self) -> None:
        self._barrier.abort()

    def exchange(self, rank: int, name: str, value: Array) -> Array:
        """Return what follows a layer: its value, or at a collective what all ranks' values make together."""
        if not name.startswith((ALLREDUCE, ALLGATHER)):
            return value
        self._values[rank], self._names[rank] = value, name
        self._barrier.wait()
        assert len(set(self._names)) == 1, f"ranks meet at different collectives: {self._names}"
        values = [x for x in self._values if x is not None]
        self._barrier.wait()
        if name.startswith(ALLREDUCE):
            return np.sum(values, axis=0, dtype=np.float32).astype(value.dtype)
        # each rank holds copies of its own part side by side
        parts = [np.split(x, len(values), axis=-1)[0] for x in values]
        return np.concatenate(parts, axis=-1)
