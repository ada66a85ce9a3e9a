"""Who owns which row of the KV cache. Decoding runs on rows 0 .. n-1, so the active rows are kept a prefix."""

from __future__ import annotations

from collections.abc import Collection

from nvlm_trt.backends.base import Backend
from nvlm_trt.runtime.sequence import Sequence


class Slots:
    """Active sequences in rows 0 .. n-1, and at most one that is being prefilled in a row behind them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.size = backend.limits.max_slots
        self.active: list[Sequence] = []  # active[i].slot == i
        self.prefilling: Sequence | None = None

    @property
    def free(self) -> int:
        return self.size - len(self.active) - (self.prefilling is not None)

    @property
    def occupants(self) -> list[Sequence]:
        return [*self.active, self.prefilling] if self.prefilling else list(self.active)

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence a row and fill the row's cross-attention cache."""
        assert self.prefilling is None
        assert self.free > 0
        sequence.slot = len(self.active)
        self.prefilling = sequence
        sequence.write_cross_kv(self._backend)

    def activate(self) -> None:
        """The prefilled sequence joins the active ones; its row is moved up if some of them retired meanwhile."""
        sequence = self.prefilling
        assert sequence is not None
        self._place(sequence, len(self.active))
        self.prefilling = None
        self.active.append(sequence)

    def retire(self, sequences: Collection[Sequence]) -> None:
        """Free the rows of these sequences; active ones from the end move into the holes."""
        if self.prefilling in sequences:
            self.prefilling = None
        kept = [sequence for sequence in self.active if sequence not in sequences]
        holes = [sequence.slot for sequence in self.active[: len(kept)] if sequence in sequences]
        behind = [sequence for sequence in kept if sequence.slot >= len(kept)]
        for sequence, hole in zip(behind, holes, strict=True):
            self._place(sequence, hole)
        self.active = sorted(kept, key=lambda sequence: sequence.slot)

    def _place(self, sequence: Sequence, slot: int) -> None:
        if sequence.slot != slot:
            self._backend.move_slot(sequence.slot, slot, sequence.cached, sequence.cross_length)
            sequence.slot = slot
