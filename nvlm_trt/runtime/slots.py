"""Assigns rows of the KV cache to answers and prompts. Decoding runs on rows 0 .. n-1, so the answers in it have these.

The rows behind them belong to prompts that are prefilled, keep what ended requests have left, or are empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

from nvlm_trt.backends.base import StepBackend
from nvlm_trt.runtime.choice import Choice
from nvlm_trt.runtime.prompt_key import PromptKey
from nvlm_trt.runtime.request import Request, State


class _Row:
    """Says what a row of the caches holds: a prompt, of which a request or an answer is the owner until it ends."""

    def __init__(self, key: PromptKey, owner: Request | Choice) -> None:
        self.key = key
        self.owner: Request | Choice | None = owner
        self.last_use = 0
        self._kept_chunks = 0

    @property
    def chunks(self) -> int:
        """Count the whole chunks of the prompt that are cached."""
        if self.owner is None:
            return self._kept_chunks
        return min(self.owner.cached // self.key.chunk_size, len(self.key.chunks))

    @property
    def length(self) -> int:
        """Count the cached tokens that are of use."""
        return self._kept_chunks * self.key.chunk_size if self.owner is None else self.owner.cached

    def disown(self) -> None:
        """Keep the whole chunks of the prompt for later prompts."""
        self._kept_chunks, self.owner = self.chunks, None

    def shared_chunks(self, key: PromptKey) -> int:
        return self.key.shared_chunks(key, self.chunks)


class Slots:
    """Holds the active answers in rows 0 .. n-1, and prompts that are prefilled in other rows. For each of these, as
    many rows can be freed as its request has answers.

    A row whose request has ended keeps the whole chunks of its prompt until the row is needed; the least recently used
    goes first. A prompt that begins with the chunks of any row takes them over from there."""

    def __init__(self, backend: StepBackend) -> None:
        self._backend = backend
        self.size = backend.limits.max_slots
        self.active: list[Choice] = []  # active[i].slot == i
        self.prefilling: list[Request] = []
        self._rows: list[_Row | None] = [None] * self.size
        self._uses = itertools.count(1)

    @property
    def free(self) -> int:
        """Count the rows that new requests can have; kept prompts do not count."""
        prefilling = tuple(self.prefilling)  # another thread may ask
        return self.size - len(self.active) - sum(request.sampling.n for request in prefilling)

    @property
    def kept(self) -> int:
        """Count the prompts of ended requests that are kept."""
        return sum(row is not None and row.owner is None for row in tuple(self._rows))

    @property
    def is_empty(self) -> bool:
        return not self.active and not self.prefilling

    @property
    def occupants(self) -> list[Request]:
        """Return the requests that have slots."""
        return [*{choice.request: None for choice in self.active}, *self.prefilling]

    def cached_tokens(self, key: PromptKey, prompt_tokens: int) -> int:
        """Count the tokens at the beginning of a prompt that some row holds. The last token is not one of them, because
        its logits are needed."""
        return self._longest(key, prompt_tokens)[1] * key.chunk_size

    def admit(self, request: Request, key: PromptKey) -> None:
        """Give a request rows for all its answers. Fill the first with what another row holds of its prompt, and with
        the cross-attention keys and values of its images."""
        assert self.free >= request.sampling.n
        assert key.cross_tokens == request.prompt.cross_tokens, (key.cross_tokens, request.prompt.cross_tokens)
        source, chunks = self._longest(key, len(request.prompt.input_ids))
        images = 0 if source is None else key.shared_images(source.key)
        slot = self._row_for(source, chunks)
        if source is not None and source is not self._rows[slot]:
            cross_tokens = key.cross_ends[images]
            self._backend.move_slot(self._rows.index(source), slot, chunks * key.chunk_size, cross_tokens)
        request.slot = slot
        request.skip(chunks * key.chunk_size)
        self._rows[slot] = _Row(key, request)
        self.prefilling.append(request)
        for start, image in list(zip(key.cross_ends, request.images, strict=False))[images:]:
            self._backend.write_cross_kv(slot, start, image)

    def activate(self, request: Request, choices: Sequence[Choice]) -> None:
        """Make the answers of a prefilled request active. Each gets a copy of the prefilled row."""
        first = len(self.active)
        self._bring(request.slot, first)
        self.prefilling.remove(request)
        row = self._rows_at(first)
        for slot, choice in enumerate(choices, start=first):
            choice.slot, choice.cached = slot, request.cached
            if slot == first:
                row.owner = choice
            else:
                self._make_room(slot)
                self._backend.move_slot(first, slot, request.cached, row.key.cross_tokens)
                self._rows[slot] = _Row(row.key, choice)
        request.state = State.DECODING
        self.active += choices

    def retire(self, requests: Collection[Request] = (), choices: Collection[Choice] = (), sound: bool = True) -> None:
        """Free the rows of these requests and answers, but keep their prompts if they are `sound`. The last active
        answers move into the rows before them."""
        for request in [request for request in self.prefilling if request in requests]:
            self.prefilling.remove(request)
            self._release(request.slot, sound)
        leaving = {choice for choice in self.active if choice in choices or choice.request in requests}
        if not leaving:
            return
        for choice in leaving:
            self._release(choice.slot, sound)
        kept = [choice for choice in self.active if choice not in leaving]
        holes = [choice.slot for choice in self.active[: len(kept)] if choice in leaving]
        behind = [choice for choice in kept if choice.slot >= len(kept)]
        for choice, hole in zip(behind, holes, strict=True):
            self._bring(choice.slot, hole)
        self.active = sorted(kept, key=lambda choice: choice.slot)

    # --- kept prompts ------------------------------------------------------------------------------------------------

    def _longest(self, key: PromptKey, prompt_tokens: int) -> tuple[_Row | None, int]:
        """Return the row that holds most of a prompt's first chunks, and their number: (None, 0) if no row has any. A
        kept row comes before one that is in use."""
        most = (prompt_tokens - 1) // key.chunk_size
        best: tuple[int, bool] = (0, False)
        source = None
        for _, row in self._held():
            found = min(row.shared_chunks(key), most), row.owner is None
            if found > best and found[0]:
                best, source = found, row
        return source, best[0]

    def _row_for(self, source: _Row | None, chunks: int) -> int:
        """Choose the row of a new prompt, which takes `chunks` chunks over from `source`."""
        if source is not None:
            source.last_use = next(self._uses)
            if source.owner is None and source.chunks == chunks:  # nothing else is lost
                return self._rows.index(source)
        if None not in self._rows:
            dropped = self._oldest()
            if self._rows[dropped] is source:  # the only kept prompt
                return dropped
            self._rows[dropped] = None
        first = len(self.active)  # where the answer is to be
        in_the_way = self._rows[first]
        if in_the_way is not None and in_the_way.owner is None:
            self._move(first, self._last_empty())
        return first if self._rows[first] is None else self._rows.index(None)

    def _release(self, slot: int, sound: bool) -> None:
        """Take a row from its owner. Keep its prompt, unless another row holds all of it."""
        row = self._rows_at(slot)
        row.disown()
        row.last_use = next(self._uses)
        self._rows[slot] = None
        if not sound or not row.chunks:
            return
        others = list(self._held())
        if any(other.shared_chunks(row.key) >= row.chunks for _, other in others):
            return
        for index, other in others:
            if other.owner is None and row.shared_chunks(other.key) >= other.chunks:
                self._rows[index] = None
        self._rows[slot] = row

    def _oldest(self) -> int:
        """Return the row of the kept prompt that was used longest ago."""
        return min((row.last_use, slot) for slot, row in self._held() if row.owner is None)[1]

    # --- rows --------------------------------------------------------------------------------------------------------

    def _held(self) -> Iterator[tuple[int, _Row]]:
        return ((slot, row) for slot, row in enumerate(self._rows) if row is not None)

    def _rows_at(self, slot: int) -> _Row:
        row = self._rows[slot]
        assert row is not None, slot
        return row

    def _last_empty(self) -> int:
        """Return the last empty row: kept prompts stand behind everything else."""
        return self.size - 1 - self._rows[::-1].index(None)

    def _bring(self, source: int, target: int) -> None:
        """Move a row. What `target` holds goes elsewhere."""
        if source == target:
            return
        occupant = self._rows[target]
        if occupant is not None and None not in self._rows:
            row = self._rows_at(source)
            length, cross = max(row.length, occupant.length), max(row.key.cross_tokens, occupant.key.cross_tokens)
            self._backend.swap_slots(source, target, length, cross)
            self._set(source, occupant)
            self._set(target, row)
            return
        if occupant is not None:
            self._move(target, self._last_empty())
        self._move(source, target)

    def _make_room(self, slot: int) -> None:
        """Empty a row. What it holds goes elsewhere, in place of the oldest kept prompt if no row is empty."""
        if self._rows[slot] is None:
            return
        if None not in self._rows:
            self._rows[self._oldest()] = None
        if self._rows[slot] is not None:
            self._move(slot, self._last_empty())

    def _move(self, source: int, target: int) -> None:
        row = self._rows_at(source)
        self._backend.move_slot(source, target, row.length, row.key.cross_tokens)
        self._rows[source] = None
        self._set(target, row)

    def _set(self, slot: int, row: _Row) -> None:
        self._rows[slot] = row
        if row.owner is not None:
            row.owner.slot = slot
