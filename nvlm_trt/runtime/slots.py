"""Assigns rows of the KV cache to answers. Decoding runs on rows 0 .. n-1, so the answers in it have the first rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nvlm_trt.backends.base import StepBackend
from nvlm_trt.runtime.choice import Choice
from nvlm_trt.runtime.request import Request, State


class Slots:
    """Holds the active answers in rows 0 .. n-1, and at most one request that is prefilled, in a later row. As many
    rows are kept free as it needs for its other answers."""

    def __init__(self, backend: StepBackend) -> None:
        self._backend = backend
        self.size = backend.limits.max_slots
        self.active: list[Choice] = []  # active[i].slot == i
        self.prefilling: Request | None = None
        self.prefill_slot = -1

    @property
    def free(self) -> int:
        prefilling = self.prefilling  # read once: another thread may ask
        return self.size - len(self.active) - (prefilling.sampling.n if prefilling else 0)

    @property
    def is_empty(self) -> bool:
        return not self.active and self.prefilling is None

    @property
    def occupants(self) -> list[Request]:
        """Return the requests that have slots."""
        requests = {choice.request: None for choice in self.active}
        return [*requests, self.prefilling] if self.prefilling else list(requests)

    def admit(self, request: Request) -> None:
        """Give a request rows for all its answers, and fill the first row's cross-attention cache."""
        assert self.prefilling is None
        assert self.free >= request.sampling.n
        self.prefill_slot = len(self.active)
        self.prefilling = request
        start = 0
        for image in request.images:
            self._backend.write_cross_kv(self.prefill_slot, start, image)
            start += image.cross_tokens
        assert start == request.prompt.cross_tokens, (start, request.prompt.cross_tokens)

    def activate(self, choices: Sequence[Choice]) -> None:
        """Make the answers of the prefilled request active. Each gets a copy of the prefilled row."""
        request = self.prefilling
        assert request is not None
        rows = range(len(self.active), len(self.active) + len(choices))
        # The prefilled row is not before `rows`. If it is among them, as a rule the first, that answer needs no copy.
        for choice, row in zip(choices, rows, strict=True):
            choice.slot, choice.cached = self.prefill_slot, request.cached
            self._place(choice, row)
        self.prefilling = None
        request.state = State.DECODING
        self.active += choices

    def retire(self, requests: Collection[Request] = (), choices: Collection[Choice] = ()) -> None:
        """Free the rows of these requests and answers. The last active answers move into free rows before them."""
        if self.prefilling in requests:
            self.prefilling = None
        leaving = {choice for choice in self.active if choice in choices or choice.request in requests}
        if not leaving:
            return
        kept = [choice for choice in self.active if choice not in leaving]
        holes = [choice.slot for choice in self.active[: len(kept)] if choice in leaving]
        behind = [choice for choice in kept if choice.slot >= len(kept)]
        for choice, hole in zip(behind, holes, strict=True):
            self._place(choice, hole)
        self.active = sorted(kept, key=lambda choice: choice.slot)

    def _place(self, choice: Choice, slot: int) -> None:
        if choice.slot != slot:
            self._backend.move_slot(choice.slot, slot, choice.cached, choice.request.prompt.cross_tokens)
            choice.slot = slot
