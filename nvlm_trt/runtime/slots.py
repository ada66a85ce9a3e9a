"""Assigns rows of the KV cache to requests. Decoding runs on rows 0 .. n-1, so active requests have the first rows."""

from __future__ import annotations

from collections.abc import Collection

from nvlm_trt.backends.base import StepBackend
from nvlm_trt.runtime.request import Request, State


class Slots:
    """Holds the active requests in rows 0 .. n-1, and at most one request that is prefilled, in a later row."""

    def __init__(self, backend: StepBackend) -> None:
        self._backend = backend
        self.size = backend.limits.max_slots
        self.active: list[Request] = []  # active[i].slot == i
        self.prefilling: Request | None = None

    @property
    def free(self) -> int:
        return self.size - len(self.active) - (self.prefilling is not None)

    @property
    def occupants(self) -> list[Request]:
        return [*self.active, self.prefilling] if self.prefilling else list(self.active)

    def admit(self, request: Request) -> None:
        """Give a request a row and fill the row's cross-attention cache."""
        assert self.prefilling is None
        assert self.free > 0
        request.slot = len(self.active)
        self.prefilling = request
        start = 0
        for image in request.images:
            self._backend.write_cross_kv(request.slot, start, image)
            start += image.cross_tokens
        assert start == request.prompt.cross_tokens, (start, request.prompt.cross_tokens)

    def activate(self) -> None:
        """Make the prefilled request active. Moves its row if active requests retired during its prefill."""
        request = self.prefilling
        assert request is not None
        self._place(request, len(self.active))
        self.prefilling = None
        request.state = State.DECODING
        self.active.append(request)

    def retire(self, requests: Collection[Request]) -> None:
        """Free the rows of these requests. The last active requests move into free rows before them."""
        if self.prefilling in requests:
            self.prefilling = None
        kept = [request for request in self.active if request not in requests]
        holes = [request.slot for request in self.active[: len(kept)] if request in requests]
        behind = [request for request in kept if request.slot >= len(kept)]
        for request, hole in zip(behind, holes, strict=True):
            self._place(request, hole)
        self.active = sorted(kept, key=lambda request: request.slot)

    def _place(self, request: Request, slot: int) -> None:
        if request.slot != slot:
            self._backend.move_slot(request.slot, slot, request.cached, request.prompt.cross_tokens)
            request.slot = slot
