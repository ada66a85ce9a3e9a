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


class Share(NamedTuple):
    """Numbers for each kind of result, as shares of the largest expected value of that kind."""

    image_tokens: float
    cross_kv: float
    logits: float


TOLERANCES = {
    "fp32": Share(4e-5, 4e-5, 4e-5),
    "fp16": Share(2e-3, 2e-3, 2e-3),
    "bf16": Share(1e-2, 1e-2, 1e-2),
    "int4-weight-only": Share(1e-2, 1e-2, 1e-2),
    "int8-weight-only": Share(1e-2, 1e-2, 1e-2),
    "fp8": Share(1e-2, 1e-2, 1e-2),
    "int8": Share(1e-2, 1e-2, 1e-2),
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
    """Judge every kind of result by the tolerances of `precision`."""
    tolerance = TOLERANCES[precision]
    odd = [name for name in expected if found[name].shape != expected[name].shape]
    if odd:
        return Result(WRONG, note=f"{odd[0]} has the shape {found[odd[0]].shape}, not {expected[odd[0]].shape}")
    limits = {
        "image_tokens": tolerance.image_tokens,
        "cross_kv": tolerance.cross_kv,
        "prefill": tolerance.logits,
        "decode": tolerance.logits,
    }
    shares = {kind: _share(found, expected, kind) for kind in limits}
    values: dict[str, Value] = {kind.replace("_", " "): share for kind, share in shares.items()}
    logits = [name for name in expected if name.startswith(("prefill.", "decode."))]
    scale = max(float(np.abs(expected[name]).max()) for name in logits)
    same = [found[name].argmax(-1) == expected[name].argmax(-1) for name in logits]
    hits = np.concatenate([np.atleast_1d(rows) for rows in same])
    values |= {"largest logit": scale, "same next token": f"{hits.sum()} of {hits.size}"}
    good = all(share is None or share <= limits[kind] for kind, share in shares.items())
    note = f"limits {tolerance.image_tokens:g}, {tolerance.cross_kv:g} and {tolerance.logits:g} of the largest value"
    return Result(PASSED if good else WRONG, values, note)


def _share(found: Arrays, expected: Arrays, kind: str) -> float | None:
    """Return the largest difference as a share of the largest expected value; None if the model has no such result.

    NaN and infinity count as 1e30: JSON has neither."""
    names = [name for name in expected if name.startswith(f"{kind}.")]
    if not names:
        return None
    differences = [np.nan_to_num(found[name] - expected[name], nan=1e30, posinf=1e30, neginf=-1e30) for name in names]
    largest = max(float(np.abs(expected[name]).max()) for name in names)
    return max(float(np.abs(difference).max()) for difference in differences) / largest
