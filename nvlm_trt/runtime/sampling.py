"""Draws tokens from logits, in the order of Hugging Face's generate and of vLLM: logit_bias, penalties, banned ids and
what a constraint forbids, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import BAN, SamplingParams
from nvlm_trt.backends.base import FloatArray, IntArray
from nvlm_trt.errors import NotFiniteError, ParameterError
from nvlm_trt.runtime.grammar import BoolArray, GrammarState

_BLOCK = 512


@dataclass(frozen=True)
class Logprobs:
    """The log softmax of logits at a token that was drawn, and at the most probable tokens."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


def answer_seed(seed: int | None, index: int) -> int | None:
    """Return the seed of answer `index` of a request with `seed`; of the first answer it is `seed` itself."""
    if seed is None or index == 0:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0])


def check_bias(params: SamplingParams, vocab_size: int, banned_ids: Collection[int], stop_ids: Collection[int]) -> None:
    """Check logit_bias against the vocabulary. Raises ParameterError for an unknown id, and for biases with which no
    token could be drawn. `stop_ids` end an answer, `banned_ids` are never drawn."""
    unknown = [token_id for token_id in params.logit_bias if token_id >= vocab_size]
    if unknown:
        raise ParameterError(
            f"sampling parameter logit_bias names the token id {min(unknown)}, which is unknown; ids are from 0 to "
            f"{vocab_size - 1}"
        )
    impossible = set(banned_ids) | {token_id for token_id, bias in params.logit_bias.items() if bias == BAN}
    if params.min_tokens:
        impossible |= set(stop_ids)
    if len(impossible) >= vocab_size:
        raise ParameterError("sampling parameter logit_bias bans every token that could be drawn; ban fewer")


class Sampler:
    """Draws the tokens of one answer with its own random generator, so other requests cannot change them."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: IntArray,
        banned_ids: Collection[int] = (),
        stop_ids: Collection[int] = (),
        index: int = 0,
        grammar: GrammarState | None = None,
    ) -> None:
        """Start answer `index` of a request. The repetition penalty also applies to `prompt_ids` [S], the other
        penalties do not; `banned_ids` are never drawn, `stop_ids` not within the first min_tokens, unless `grammar`
        allows nothing else."""
        self._params = params
        self._grammar = grammar
        self._banned = _ids(banned_ids)
        self._not_yet = params.min_tokens  # tokens to be drawn before a stop id
        self._banned_first = _ids({*banned_ids, *stop_ids})
        self._bias_ids = _ids(params.logit_bias)
        biases = [params.logit_bias[token_id] for token_id in self._bias_ids.tolist()]
        self._biases = np.array([-np.inf if bias == BAN else bias for bias in biases], np.float32)
        self._seen = set(np.unique(prompt_ids).tolist()) if params.repetition_penalty != 1 else set()
        self._has_counts = bool(params.presence_penalty or params.frequency_penalty)
        self._counts: dict[int, int] = {}  # of the tokens of the answer
        has_penalties = self._has_counts or params.repetition_penalty != 1
        self._keeps_order = not (params.logit_bias or has_penalties)
        self._remembers = bool(has_penalties or params.min_tokens)
        self._random = np.random.default_rng(answer_seed(params.seed, index))

    def sample(self, logits: FloatArray) -> tuple[int, Logprobs | None]:
        """Draw the next token from logits [vocab], which are not changed. Return it, and its logprobs if the request
        asks for them. Raises NotFiniteError for logits that are not finite."""
        if not np.isfinite(logits).all():
            raise NotFiniteError(
                "the model produced logits that are not finite; check the engine with `nvlm-trt verify`"
            )
        token_id = self._draw(logits) if self._params.temperature else self._most_probable(logits)
        if self._grammar:
            self._grammar.accept(token_id)
        if self._remembers:
            self._remember(token_id)
        if not self._params.logprobs:
            return token_id, None
        return token_id, token_logprob(logits, token_id, self._params.logprobs)

    def _remember(self, token_id: int) -> None:
        if self._params.repetition_penalty != 1:
            self._seen.add(token_id)
        if self._has_counts:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._not_yet:
            self._not_yet -= 1

    def _most_probable(self, logits: FloatArray) -> int:
        if self._keeps_order:
            token_id = int(logits.argmax())
            if token_id not in self._forbidden and (self._grammar is None or self._grammar.allows(token_id)):
                return token_id
        return int(self._scores(logits).argmax())

    def _draw(self, logits: FloatArray) -> int:
        token_ids, weights = candidates(self._scores(logits), self._params)
        return int(token_ids[draw(weights, self._random.random())])

    @property
    def _forbidden(self) -> IntArray:
        """Return the ids [n] that the next token must not have."""
        return self._banned_first if self._not_yet else self._banned

    def _scores(self, logits: FloatArray) -> FloatArray:
        """Copy the logits, add the biases, apply the penalties, and set the forbidden ids to -inf."""
        scores = logits.astype(np.float32, copy=True)
        if len(self._bias_ids):
            scores[self._bias_ids] += self._biases
        if self._seen:
            seen = np.fromiter(self._seen, dtype=np.int64)
            penalty = self._params.repetition_penalty
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        if self._counts:
            counted = np.fromiter(self._counts, dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float32)
            scores[counted] -= self._params.frequency_penalty * counts + self._params.presence_penalty
        if self._grammar is None:
            scores[self._forbidden] = -np.inf
        else:
            np.copyto(scores, -np.inf, where=~self._allowed(self._grammar))
            if scores.max() == -np.inf:
                raise ParameterError("sampling parameter logit_bias bans every token that constraint allows; ban fewer")
        return scores

    def _allowed(self, grammar: GrammarState) -> BoolArray:
        """Return which tokens [vocab] may be drawn: what `grammar` allows but the forbidden ids. Where that leaves
        none, the answer ends before min_tokens."""
        allowed = grammar.allowed()
        allowed[self._banned] = False
        if self._not_yet:
            before_the_end = allowed.copy()
            before_the_end[self._forbidden] = False
            if before_the_end.any():
                return before_the_end
        return allowed


def _ids(token_ids: Collection[int]) -> IntArray:
    return np.array(sorted(token_ids), dtype=np.int64)


def candidates(scores: FloatArray, params: SamplingParams) -> tuple[IntArray, FloatArray]:
    """Filter scores [vocab], at least one finite. Return the ids that pass the filters [n] and relative weights [n].

    Tokens that tie with the last one kept by top-k or top-p are kept as well. A token of weight 0 is never drawn.
    """
    token_ids, kept = np.arange(len(scores)), scores
    if 0 < params.top_k < len(scores):
        token_ids = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
        kept = scores[token_ids]
    # A temperature below float32's smallest number would divide 0 by 0. At that number, sampling is greedy already.
    temperature = max(params.temperature, float(np.finfo(np.float32).tiny))
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0
        weights = np.exp((kept - kept.max()) / np.float32(temperature))  # [n], the best has 1
    if params.top_p < 1:
        keep = weights >= _nucleus_floor(weights, params.top_p)
        token_ids, weights = token_ids[keep], weights[keep]
    if params.min_p > 0:
        keep = weights >= params.min_p
        token_ids, weights = token_ids[keep], weights[keep]
    return token_ids, weights


def _nucleus_floor(weights: npt.NDArray[np.float32], top_p: float) -> np.float32:
    """Return the smallest weight in the shortest list of likeliest tokens whose probabilities reach top_p.

    The largest of `weights` is 1."""
    wanted = top_p * weights.sum(dtype=np.float64)
    likely = weights[weights > 1e-4]  # few to sort; they reach top_p except in very flat distributions
    if likely.sum(dtype=np.float64) < wanted:
        likely = weights
    descending = np.sort(likely)[::-1]
    last = int(np.searchsorted(descending.cumsum(dtype=np.float64), wanted, side="left"))
    return descending[min(last, len(descending) - 1)]


def draw(weights: FloatArray, uniform: float) -> int:
    """Return the index at which the running sum of weights [n] passes `uniform` (0 <= uniform < 1) times their sum.

    Sums blocks first: a running sum over a whole vocabulary takes ten times as long.
    """
    totals = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    target = uniform * totals[-1]
    block = int(np.searchsorted(totals, target, side="right"))
    start = block * _BLOCK
    positive = start + np.flatnonzero(weights[start : start + _BLOCK])
    running = (totals[block - 1] if block else 0.0) + weights[positive].cumsum(dtype=np.float64)
    # min, because the sum by blocks and the running sum may differ in the last bit
    return int(positive[min(int(np.searchsorted(running, target, side="right")), len(positive) - 1)])


def token_logprob(logits: FloatArray, token_id: int, alternatives: int) -> Logprobs:
    """Compute the log softmax of logits [vocab] at token_id and at the `alternatives` most probable tokens."""
    best = float(logits.max())
    normaliser = best + float(np.log(np.exp(logits - logits.max()).sum(dtype=np.float64)))
    alternatives = min(alternatives, len(logits))
    top = np.argpartition(logits, -alternatives)[-alternatives:]
    top = top[np.lexsort((top, -logits[top]))]
    return Logprobs(
        token_id, float(logits[token_id]) - normaliser, tuple((int(i), float(logits[i]) - normaliser) for i in top)
    )
