"""Tests that the comparisons of test_understood.py would notice a parser that understood a layer otherwise: each
control changes one meaning, and the results must differ by far more than two honest computations do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from decoder_scenario import CALLS, Call
from layer_meanings import Meaning, last_key
from layer_reading import Array
from network_interpreter import LayerError, run
from parsed_network import ParsedNetwork
from side_by_side import SideBySide
from tiny_networks import Variant, parsed_stage, pixels, scenario, write_stage

# Two honest float32 computations differ by less than 1e-5, so this is more than 100 times as much.
SEEN = 1e-3
ONE_PERCENT = np.float32(1.01)


def at_cache_end(causal: str, lengths: Array, tokens: int, keys: int) -> Array:
    """Anchor LOWER_RIGHT at the cache's end instead of the end of what is in use."""
    return last_key(causal, np.full_like(lengths, keys), tokens, keys)


def upper_left(causal: str, lengths: Array, tokens: int, keys: int) -> Array:
    return last_key("NONE" if causal == "NONE" else "UPPER_LEFT", lengths, tokens, keys)


def rotated_backwards(sine: Array) -> Array:
    return -sine


def gelu_tanh(x: Array) -> Array:
    return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).astype(x.dtype)


SELF_ATTENTION: dict[str, Meaning] = {
    "causality from the upper left": Meaning(last_key=upper_left),
    "causality at the cache's end": Meaning(last_key=at_cache_end),
    "no causality": Meaning(last_key=lambda causal, lengths, tokens, keys: last_key("NONE", lengths, tokens, keys)),
    "one token less": Meaning(last_key=lambda *given: np.maximum(last_key(*given) - 1, 0)),
    "lengths ignored": Meaning(keys_in_use=lambda lengths, batch, keys: np.full(batch, keys)),
    "every row of the first's length": Meaning(
        keys_in_use=lambda lengths, batch, keys: np.full(batch, keys if lengths is None else lengths[0])
    ),
    "key heads interleaved": Meaning(key_head=lambda heads, key_heads: np.arange(heads) % key_heads),
    "scores scaled twice": Meaning(score_scale=lambda head_dim: head_dim**-0.5),
    "rotation of neighbours": Meaning(
        rotary_pairs=lambda size, interleaved: (np.arange(0, size, 2), np.arange(1, size, 2))
    ),
    "rotation backwards": Meaning(rotary_sine=rotated_backwards),
    "cache written one place later": Meaning(first_written=lambda write_index: write_index + 1),
    "cache written from its start": Meaning(first_written=lambda write_index: 0),
}
CROSS_ATTENTION: dict[str, Meaning] = {
    "mask inverted": Meaning(visible=np.logical_not),
    "mask ignored": Meaning(visible=np.ones_like),
    "mask of each row shifted by one key": Meaning(visible=lambda mask: np.roll(mask, 1, axis=-1)),
    "key heads interleaved": SELF_ATTENTION["key heads interleaved"],
}


def difference(parsed: ParsedNetwork, architecture: str, meaning: Meaning, calls: Mapping[str, Call] = CALLS) -> float:
    """Return the difference from the oracle; infinity if the run fails or a result is not a number."""
    rows = scenario(architecture)
    found = failing_as_infinity(
        lambda: rows.play(lambda feeds: run(parsed, feeds, meaning), calls).difference(rows.expected(calls))
    )
    return math.inf if math.isnan(found) else found


def failing_as_infinity(compute: Callable[[], float]) -> float:
    try:
        return compute()
    except (LayerError, AssertionError):
        return math.inf


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ParsedNetwork]:
    directory = tmp_path_factory.mktemp("decoders")
    forms = [Variant("D"), Variant("H", "function"), Variant("H", "masked")]
    return {f"{form.architecture} {form.cross}": parsed_stage(form, "decoder", directory) for form in forms}


@pytest.mark.parametrize("control", SELF_ATTENTION)
def test_self_attention(control: str, decoders: dict[str, ParsedNetwork]) -> None:
    assert difference(decoders["D function"], "D", SELF_ATTENTION[control]) > SEEN


@pytest.mark.parametrize("form", ["H function", "H masked"])
@pytest.mark.parametrize("control", CROSS_ATTENTION)
def test_cross_attention(control: str, form: str, decoders: dict[str, ParsedNetwork]) -> None:
    assert difference(decoders[form], "H", CROSS_ATTENTION[control]) > SEEN


def test_honest_meanings_pass(decoders: dict[str, ParsedNetwork]) -> None:
    for form, parsed in decoders.items():
        assert difference(parsed, form[0], Meaning()) < SEEN / 100


def test_image_tokens_counted_exclusively(decoders: dict[str, ParsedNetwork]) -> None:
    meaning = Meaning(cumulative_sum=lambda x, axis: np.cumsum(x, axis=axis, dtype=x.dtype) - x)
    assert difference(decoders["D function"], "D", meaning) > SEEN


def test_division_that_floors_leaves_no_key_where_all_ranges_are_empty(decoders: dict[str, ParsedNetwork]) -> None:
    """The function counts (0 - 1) / 16 + 1 blocks of keys. The masked form divides nothing."""
    floors = Meaning(integer_quotient=np.floor_divide)
    with pytest.raises(LayerError, match="attention over no keys"):
        run_prompt_without_image(decoders["H function"], floors)
    assert difference(decoders["H masked"], "H", floors) < SEEN / 100


def run_prompt_without_image(parsed: ParsedNetwork, meaning: Meaning) -> None:
    name = "a prompt without image"
    scenario("H").play(lambda feeds: run(parsed, feeds, meaning), {name: CALLS[name]})


def test_decoding_single_tokens_does_not_tell_where_causality_ends(decoders: dict[str, ParsedNetwork]) -> None:
    """A single new token reads everything in use either way: only calls with several tokens tell."""
    parsed, wrong = decoders["D function"], Meaning(last_key=at_cache_end)
    single = {f"token {place}": Call((1,), (place,), 1, (0,)) for place in range(12)}
    assert difference(parsed, "D", wrong, single) < SEEN / 100
    several = {"all at once": Call((1,), (0,), 12, (11,))}
    assert difference(parsed, "D", wrong, several) > SEEN


def test_gelu_by_tanh(tmp_path: Path) -> None:
    feeds = {"pixel_values": pixels("D")}
    path = write_stage(Variant("D"), "vision_encoder", tmp_path)
    honest, other = SideBySide(path), SideBySide(path, Meaning(gelu_erf=gelu_tanh))
    honest(feeds)
    other(feeds)
    assert other.difference > 100 * honest.difference


QUANTISATION: dict[str, tuple[str, Meaning]] = {
    "scales ignored": ("int8", Meaning(dequantised=lambda values, scale: values)),
    "scales of int8 1 % too large": ("int8", Meaning(dequantised=lambda values, scale: values * scale * ONE_PERCENT)),
    "scales of fp8 1 % too large": ("fp8", Meaning(dequantised=lambda values, scale: values * scale * ONE_PERCENT)),
    "weights' scales 1 % too large": (
        "fp8",
        Meaning(dequantised=lambda values, scale: values * (scale * ONE_PERCENT if scale.ndim else scale)),
    ),
    "channels' scales reversed": ("int8", Meaning(dequantised=lambda values, scale: values * np.flip(scale))),
    "blocks' scales of the next block": (
        "int4-weight-only",
        Meaning(dequantised=lambda values, scale: values * np.roll(scale, 32, axis=0)),
    ),
    "numbers cut off, not rounded": ("int8", Meaning(rounded=np.trunc)),
}


@pytest.mark.parametrize("control", QUANTISATION)
def test_quantisation(control: str, tmp_path: Path) -> None:
    weight_format, meaning = QUANTISATION[control]
    path = write_stage(Variant("D", weight_format=weight_format), "decoder", tmp_path)
    both = SideBySide(path, meaning)

    def compute() -> float:
        scenario("D").play(both)
        return float(both.difference)

    assert failing_as_infinity(compute) > SEEN


def test_4_bit_numbers_in_the_other_half_of_their_byte(tmp_path: Path) -> None:
    both = SideBySide(write_stage(Variant("D", weight_format="int4-weight-only"), "decoder", tmp_path))
    for layer in both.parsed.of_kind("CONSTANT"):
        if layer.output.kind == "INT4":
            values = both.parsed.constants[layer.output.name]
            both.parsed.constants[layer.output.name] = values.reshape(-1, 2)[:, ::-1].reshape(values.shape)
    scenario("D").play(both)
    assert both.difference > SEEN
