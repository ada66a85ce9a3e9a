"""Draws tokens from logits, in the order of Hugging Face's generate: repetition penalty, temperature, top-k, top-p,
min-p.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import SamplingParams, TokenLogprob
from nvlm_trt.backends.base import FloatArray, IntArray
from nvlm_trt.errors import NotFiniteError

_BLOCK = 512


class Sampler:
    """Draws the tokens of one request with its own random generator, so other requests cannot change them."""

    def __init__(self, params: SamplingParams, prompt_ids: IntArray, banned_ids: Collection[int] = ()) -> None:
        """Start a request. The repetition penalty also applies to `prompt_ids` [S]; `banned_ids` are never drawn."""
        self._params = params
        self._banned = np.array(sorted(banned_ids), dtype=np.int64)
        self._seen = set(np.unique(prompt_ids).tolist()) if params.repetition_penalty != 1 else set()
        self._random = np.random.default_rng(params.seed)

    def sample(self, logits: FloatArray) -> tuple[int, TokenLogprob | None]:
        """Draw the next token from logits [vocab], which are not changed. Return it, and its logprobs if the request
        asks for them. Raises NotFiniteError for logits that are not finite."""
        if not np.isfinite(logits).all():
            raise NotFiniteError(
                "the model produced logits that are not finite; check the engine with `nvlm-trt verify`"
            )
        token_id = self._draw(logits) if self._params.temperature else self._most_probable(logits)
        if self._params.repetition_penalty != 1:
            self._seen.add(token_id)
        if not self._params.logprobs:
            return token_id, None
        return token_id, token_logprob(logits, token_id, self._params.logprobs)

    def _most_probable(self, logits: FloatArray) -> int:
        if self._params.repetition_penalty == 1:
            token_id = int(logits.argmax())
            if token_id not in self._banned:
                return token_id
        return int(self._scores(logits).argmax())

    def _draw(self, logits: FloatArray) -> int:
        token_ids, weights = candidates(self._scores(logits), self._params)
        return int(token_ids[draw(weights, self._random.random())])

    def _scores(self, logits: FloatArray) -> FloatArray:
        """Copy the logits, apply the repetition penalty, and set the banned ids to -inf."""
        scores = logits.astype(np.float32, copy=True)
        if self._seen:
            seen = np.fromiter(self._seen, dtype=np.int64)
            penalty = self._params.repetition_penalty
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        scores[self._banned] = -np.inf
        return scores


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


def token_logprob(logits: FloatArray, token_id: int, alternatives: int) -> TokenLogprob:
    """Compute the log softmax of logits [vocab] at token_id and at the `alternatives` most probable tokens."""
    best = float(logits.max())
    normaliser = best + float(np.log(np.exp(logits - logits.max()).sum(dtype=np.float64)))
    alternatives = min(alternatives, len(logits))
    top = np.argpartition(logits, -alternatives)[-alternatives:]
    top = top[np.lexsort((top, -logits[top]))]
    return TokenLogprob(
        token_id, float(logits[token_id]) - normaliser, tuple((int(i), float(logits[i]) - normaliser) for i in top)
    )
