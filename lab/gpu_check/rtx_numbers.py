"""Runs the same steps of an engine on two backends and compares their numbers.

A step of decoding has one query, which reads every key wherever the causal mask is anchored. So prompts of several
tokens run here in several calls, one of them is longer than the backend's own chunks, and one ends with the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lab.gpu_check.record import PASSED, WRONG, Result, Value

if TYPE_CHECKING:
    from nvlm_trt.backends.base import FloatArray, ImageFeatures, IntArray, StepBackend

LIMITS = {"max_slots": 4, "max_seq_len": 2048}
# Where a new call of `prefill` begins in the prompts of the slots: after one token, within an image, within a chunk.
CUTS = ((13, 14, 20, 40), (3,), (1060,), ())
SLOTS = range(len(CUTS))
DECODED = (4, 3, 3)  # slots of the decoding steps; the last step repeats a recorded CUDA graph


class Tolerance(NamedTuple):
    """The largest differences that are right, as shares of the largest expected value.

    `logits` bounds the median of all steps: in some steps of a tiny model, a rounding of bf16 moves a logit by a
    quarter of the largest. `worst` bounds all steps of a precision in which no step does."""

    image_tokens: float
    cross_kv: float
    logits: float
    worst: float | None = None


# Twice what ONNX Runtime's numbers change if it rounds the result of every operator to the precision's own type, and
# for fp32 1e-3 of the logits' scale, 26. The smallest median that a wrong causal mask gave was 0.042.
TOLERANCES = {
    "fp32": Tolerance(4e-5, 4e-5, 4e-5, 1e-3),
    "fp16": Tolerance(4e-3, 4e-3, 2e-3, 3e-2),
    "bf16": Tolerance(2e-2, 2e-2, 1e-2),
    "int8": Tolerance(2e-2, 5e-2, 4e-2),
    "fp8": Tolerance(2e-2, 5e-2, 4e-2),
    "int8-weight-only": Tolerance(2e-2, 2e-2, 2e-2),
    "int4-weight-only": Tolerance(2e-2, 2e-2, 2e-2),
}


Arrays = Mapping[str, Any]  # name -> array; see `run_steps`


def run_steps(backend: StepBackend, given: Arrays) -> dict[str, FloatArray | IntArray]:
    """Encode images, prefill the prompts of all slots and decode the slots at their different lengths.

    `given`: pixels.SLOT [tiles, 3, E, E]; input_ids.SLOT [S] and cross_ranges.SLOT [S, 2] of each slot's prompt, whose
    last token every generated token reads like; next.STEP [n], the tokens of a decoding step. Tokens that are not given
    are the likeliest ones, and are among the results: other backends are given these, or one rounding that changes a
    token would change all steps after it. Returns the numbers of each step."""
    found: dict[str, FloatArray | IntArray] = {}
    images: dict[int, ImageFeatures] = {}
    for slot in SLOTS:
        if f"pixels.{slot}" in given:
            tokens = backend.encode(given[f"pixels.{slot}"])  # [tiles, T, hidden]
            found[f"image_tokens.{slot}"] = backend.to_host(tokens).copy()
            images[slot] = backend.features(tokens)
            cross_kv = images[slot].cross_kv  # [cross layers, 2, kv_heads, C, head_dim]
            if cross_kv is not None:
                found[f"cross_kv.{slot}"] = backend.to_host(cross_kv).copy()
                backend.write_cross_kv(slot, 0, images[slot])
    likeliest = np.zeros(len(SLOTS), np.int64)
    for slot in SLOTS:
        for start, logits in _prefill(backend, slot, given, images.get(slot)):
            found[f"prefill.{slot}.{start}"] = logits
            likeliest[slot] = logits.argmax()
    lengths = np.array([len(given[f"input_ids.{slot}"]) for slot in SLOTS])
    ranges = np.array([given[f"cross_ranges.{slot}"][-1] for slot in SLOTS])
    for step, slots in enumerate(DECODED):
        tokens = given.get(f"next.{step}", likeliest[:slots])
        logits = backend.decode(tokens, lengths[:slots] + step, ranges[:slots]).copy()  # [n, vocab]
        likeliest = logits.argmax(-1)
        found |= {f"next.{step}": tokens, f"decode.{step}": logits}
    return found


def _prefill(
    backend: StepBackend, slot: int, given: Arrays, image: ImageFeatures | None
) -> Iterator[tuple[int, FloatArray]]:
    """Yield the start of each call and the logits [vocab] of the call's last token."""
    input_ids, cross_ranges = given[f"input_ids.{slot}"], given[f"cross_ranges.{slot}"]
    is_image = input_ids == backend.config.image_token_id
    images = [] if image is None else [image]
    bounds = [0, *CUTS[slot], len(input_ids)]
    for start, stop in itertools.pairwise(bounds):
        rows = backend.embeddings(images, int(is_image[:start].sum()), int(is_image[:stop].sum()))
        yield start, backend.prefill(slot, start, input_ids[start:stop], rows, cross_ranges[start:stop]).copy()


def compare(found: Arrays, expected: Arrays, precision: str) -> Result:
    """Judge the numbers of every step by the tolerances of `precision`."""
    limits = TOLERANCES[precision]
    names = [name for name in expected if name.startswith(("image_tokens.", "cross_kv.", "prefill.", "decode."))]
    odd = [name for name in names if name not in found or found[name].shape != expected[name].shape]
    if odd:
        return Result(WRONG, note=f"{odd[0]} is missing or has another shape than {expected[odd[0]].shape}")
    shares = {name: _shares(found[name], expected[name]) for name in names}
    logits = np.concatenate([shares[name] for name in names if name.startswith(("prefill.", "decode."))])
    tokens = [found[name].argmax(-1) == expected[name].argmax(-1) for name in names if name.startswith("decode.")]
    median, worst = float(np.median(logits)), float(logits.max())
    image_tokens, cross_kv = (_largest(shares, kind) for kind in ("image_tokens.", "cross_kv."))
    judged = [(image_tokens, limits.image_tokens), (cross_kv, limits.cross_kv), (median, limits.logits)]
    good = all(share is None or limit is None or share <= limit for share, limit in [*judged, (worst, limits.worst)])
    values: dict[str, Value] = {"image tokens": image_tokens, "cross K/V": cross_kv}
    values |= {"logits, median": median, "logits, worst": worst}
    values["same next token"] = f"{np.concatenate(tokens).sum()} of {np.concatenate(tokens).size}"
    shown = ", ".join("-" if limit is None else f"{limit:g}" for limit in limits)
    return Result(PASSED if good else WRONG, values, f"limits {shown}")


def _shares(found: FloatArray, expected: FloatArray) -> FloatArray:
    """Return the largest difference of each row [..., n] as a share of the row's largest expected value.

    Rows of image tokens, keys and values count as one. NaN and infinity count as 1e30: JSON has neither."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.nan_to_num(found - expected, nan=1e30, posinf=1e30, neginf=-1e30))
    rows = -1 if expected.ndim <= 2 else None  # logits are [vocab] or [n, vocab]
    return np.atleast_1d(difference.max(rows) / np.abs(expected).max(rows))


def _largest(shares: Mapping[str, FloatArray], kind: str) -> float | None:
    """Return the largest share of one kind of results, None if the model has none."""
    return max((float(share.max()) for name, share in shares.items() if name.startswith(kind)), default=None)
