"""Checks gated cross-attention: makes inputs and the outputs that they must give, and compares the kernel's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.gpu_check.record import PASSED, WRONG, NotAvailableError, Result, Trial, Value
from nvlm_trt.model.config import CrossAttentionConfig, LlmConfig
from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS, Blocks, candidates
from nvlm_trt.plugins.gated_cross_attention.launcher import gated_cross_attention
from nvlm_trt.reference.cross_attention import CrossAttention

SECTION = "attention"

# The largest error in units of 1 + |expected|, and the root mean square of all errors relative to that of the expected
# values: a few roundings of the type for the first, one for the second. A lost block of keys would give about 0.1.
TOLERANCES = {
    torch.float32: (4e-6, 1e-5),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 8e-3),
}


class Shape(NamedTuple):
    """Sizes of B sequences of S tokens that attend to N image tokens."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    cross_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.batch} x {self.tokens} tokens, "
            f"{self.cross_tokens} image tokens"
        )


# The 72B model: a step of 8 requests, and a prompt of 1,024 tokens, each with an image of 6 + 1 tiles of 256 tokens.
DECODE = Shape(64, 8, 128, batch=8, tokens=1, cross_tokens=1792)
PREFILL = Shape(64, 8, 128, batch=1, tokens=1024, cross_tokens=1792)

SMALL = (
    Shape(8, 1, 128, 2, 1, 150),
    Shape(7, 1, 128, 1, 3, 70),  # a group that does not divide a block of rows
    Shape(4, 4, 64, 3, 1, 130),  # no groups
    Shape(14, 2, 64, 2, 9, 129),
    Shape(6, 2, 80, 1, 11, 65),
    Shape(4, 2, 96, 2, 10, 1),
    Shape(4, 2, 32, 1, 9, 140),  # the tiny models
    Shape(40, 1, 64, 1, 2, 33),  # a group larger than a block of rows
)
PROMPT = Shape(8, 2, 64, 1, 21, 301)  # several blocks of rows and of keys, for every entry of the table
# For the kernel of Hopper GPUs: tiles of 128 rows, blocks of 128 keys. Each heads/key heads/size is compiled anew.
TILES = (
    Shape(16, 2, 128, 1, 129, 128),  # one block of keys, whole, and a last tile of one token
    Shape(16, 2, 128, 2, 70, 700),
    Shape(16, 2, 128, 3, 1, 150),
    Shape(3, 1, 128, 1, 100, 513),  # a group that does not divide a tile; a block of one key
    Shape(3, 1, 128, 2, 2, 1),
    Shape(14, 2, 64, 2, 90, 300),
)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    cross_ranges: Tensor
    gate: Tensor


Launch = Callable[[Inputs], Tensor]


def make_inputs(shape: Shape, ranges: Tensor, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Draws normally distributed inputs, the same on every machine."""
    random = torch.Generator().manual_seed(seed)
    heads, kv_heads, head_dim, batch, tokens, cross_tokens = shape
    sizes = (batch, heads, tokens, head_dim), *[(batch, kv_heads, cross_tokens, head_dim)] * 2
    query, key, value = (torch.randn(size, generator=random).to(device, dtype) for size in sizes)
    gate = torch.tensor([-0.7], dtype=dtype, device=device)
    return Inputs(query, key, value, ranges.to(device, torch.int32), gate)


def full_ranges(shape: Shape) -> Tensor:
    """Lets every token read everything: [B, S, 2]."""
    return torch.tensor([0, shape.cross_tokens]).expand(shape.batch, shape.tokens, 2).contiguous()


def prompt_ranges(shape: Shape, tiles: int = 7, before: int = 16, tag: int = 5) -> Tensor:
    """Makes the ranges of an NVLM-X prompt with one image: `before` tokens read nothing, then `tag` tokens of each tile
    read that tile, then text reads all: [B, S, 2]."""
    size = shape.cross_tokens // tiles
    ranges = full_ranges(shape)
    ranges[:, :before] = 0
    for tile in range(tiles):
        at = before + tile * tag
        ranges[:, at : at + tag] = torch.tensor([tile * size, (tile + 1) * size])
    return ranges


def random_ranges(shape: Shape, seed: int = 0) -> Tensor:
    """Draws ranges of every length, a third of them empty, the last one full: [B, S, 2]."""
    random = torch.Generator().manual_seed(seed)
    size = shape.batch, shape.tokens
    ranges = torch.randint(0, shape.cross_tokens + 1, (*size, 2), generator=random).sort(dim=-1).values
    ranges[torch.rand(size, generator=random) < 1 / 3] = 0
    ranges[-1, -1] = torch.tensor([0, shape.cross_tokens])
    return ranges


def is_empty(inputs: Inputs) -> Tensor:
    """Marks tokens that read nothing: [B, 1, S, 1]."""
    ranges = inputs.cross_ranges
    return (ranges[..., 0] >= ranges[..., 1])[:, None, :, None]


def boolean_mask(inputs: Inputs) -> Tensor:
    """Makes the mask that torch's attention takes in place of ranges: [B, 1, S, N]."""
    at = torch.arange(inputs.key.shape[2], device=inputs.key.device)
    return ((at >= inputs.cross_ranges[..., :1]) & (at < inputs.cross_ranges[..., 1:]))[:, None]


@torch.no_grad()
def oracle(inputs: Inputs) -> Tensor:
    """Computes the reference model's attention without its projections, in float64: [B, H, S, D]."""
    heads, head_dim = inputs.query.shape[1], inputs.query.shape[3]
    llm = LlmConfig(
        family="llama",
        hidden_size=heads * head_dim,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=inputs.key.shape[1],
        intermediate_size=1,
        vocab_size=1,
        rope_theta=1e4,
        head_dim=head_dim,
    )
    with torch.device("meta"):  # the projections' weights would be large
        attention = CrossAttention(llm, CrossAttentionConfig(interval=1))
    for projection in ("q_proj", "o_proj"):
        setattr(attention, projection, torch.nn.Identity())
    query, key, value = (tensor.double() for tensor in inputs[:3])
    rows = [
        attention(query[b : b + 1].transpose(1, 2).flatten(2), key[b], value[b], inputs.cross_ranges[b : b + 1])
        for b in range(len(query))
    ]
    output = torch.cat(rows).unflatten(-1, (heads, head_dim)).transpose(1, 2)
    return torch.tanh(inputs.gate.double()) * output


def torch_attention(inputs: Inputs) -> Tensor:
    """Computes the oracle's outputs by torch's attention with a mask, in the inputs' own type: [B, H, S, D]."""
    query, key, value = inputs[:3]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=boolean_mask(inputs), enable_gqa=True)
    return (torch.tanh(inputs.gate) * output).masked_fill(is_empty(inputs), 0.0)


def launch(inputs: Inputs, blocks: Blocks | None = None) -> Tensor:
    """Calls the kernel: [B, H, S, D]. Raises NotAvailableError if the GPU has too little shared memory for `blocks`."""
    from triton.runtime.errors import OutOfResources

    try:
        return gated_cross_attention(*inputs, blocks=blocks)
    except OutOfResources as error:
        raise NotAvailableError(f"the blocks do not fit this GPU: {error}") from None


def launch_on_hopper(inputs: Inputs) -> Tensor:
    """Calls the kernel of Hopper GPUs, however few the rows are. Raises NotAvailableError on other GPUs."""
    if torch.cuda.get_device_capability() != (9, 0):
        raise NotAvailableError("the GPU is not a Hopper")
    from nvlm_trt.plugins.gated_cross_attention.hopper.launcher import prefill

    output = torch.full_like(inputs.query, torch.nan)
    prefill(*inputs, output)
    return output


class Error(NamedTuple):
    largest: float  # in units of 1 + |expected|
    rms: float  # relative to the rms of the expected values

    @classmethod
    def of(cls, output: Tensor, expected: Tensor) -> Error:
        """Counts NaN and infinity as 1e30: JSON has neither."""
        difference = (output.double() - expected).nan_to_num(1e30, 1e30, 1e30).abs()
        size = expected.square().mean().sqrt().clamp_min(1e-30)
        return cls(float((difference / (1 + expected.abs())).max()), float(difference.square().mean().sqrt() / size))

    def is_within(self, dtype: torch.dtype) -> bool:
        largest, rms = TOLERANCES[dtype]
        return self.largest <= largest and self.rms <= rms


def compare(shape: Shape, ranges: Tensor, dtype: torch.dtype, device: str, launch: Launch = launch) -> Result:
    """Compares the kernel and torch's attention with the oracle, and requires exact zeros for empty ranges."""
    inputs = make_inputs(shape, ranges, dtype, device)
    output, expected = launch(inputs), oracle(inputs)
    error, of_torch = Error.of(output, expected), Error.of(torch_attention(inputs), expected)
    zeros = bool((output.masked_select(is_empty(inputs)) == 0).all())
    good = error.is_within(dtype) and zeros and output.dtype == dtype
    values: dict[str, Value] = {
        "largest error": error.largest,
        "rms error": error.rms,
        "rms error of torch": of_torch.rms,
    }
    largest, rms = TOLERANCES[dtype]
    note = f"limits {largest:g} and {rms:g}" if zeros else "an empty range is not exactly zero"
    return Result(PASSED if good else WRONG, values, note)


def independence(shape: Shape, dtype: torch.dtype, device: str, launch: Launch) -> Result:
    """Checks that neither values outside the ranges nor neighbouring tokens change a bit of a token's output."""
    inputs = make_inputs(shape, random_ranges(shape, seed=3), dtype, device)
    output = launch(inputs)
    faults = []
    lowest, highest = (int(n) for n in (shape.cross_tokens // 3, shape.cross_tokens // 2))
    narrow = inputs.cross_ranges.clamp(lowest, highest)
    before = launch(inputs._replace(cross_ranges=narrow))
    poisoned = inputs._replace(cross_ranges=narrow, key=inputs.key.clone(), value=inputs.value.clone())
    for tensor in (poisoned.key, poisoned.value):
        tensor[:, :, :lowest], tensor[:, :, highest:] = torch.nan, torch.inf
    if not before.equal(launch(poisoned)):
        faults.append("keys outside the ranges change the result")
    nothing = poisoned._replace(cross_ranges=torch.zeros_like(narrow))
    if launch(nothing).count_nonzero():
        faults.append("empty ranges do not give zero")
    for b in range(shape.batch):
        s = b % shape.tokens
        alone = Inputs(
            inputs.query[b : b + 1, :, s : s + 1].contiguous(),
            inputs.key[b : b + 1].contiguous(),
            inputs.value[b : b + 1].contiguous(),
            inputs.cross_ranges[b : b + 1, s : s + 1].contiguous(),
            inputs.gate,
        )
        if not launch(alone)[0, :, 0].equal(output[b, :, s]):
            faults.append(f"token {s} of sequence {b} has other bits alone than in a batch")
    return Result(WRONG if faults else PASSED, note="; ".join(faults))


def trials(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Trial]:
    """Yields fewer and smaller trials on the CPU, where the interpreter is slow."""
    on_gpu = device != "cpu"
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if on_gpu:
            yield f"{name}, decoding: {DECODE}", partial(compare, DECODE, full_ranges(DECODE), dtype, device)
            yield f"{name}, prefill: {PREFILL}", partial(compare, PREFILL, prompt_ranges(PREFILL), dtype, device)
        for shape in SMALL if on_gpu else SMALL[:2]:
            yield f"{name}: {shape}", partial(compare, shape, random_ranges(shape), dtype, device)
        prompt = prompt_ranges(PROMPT, tiles=3, before=2, tag=5)
        for number in candidates(dtype.itemsize):
            yield (
                f"{name}, block table's entry {number}: {PROMPT}",
                partial(compare, PROMPT, prompt, dtype, device, partial(launch, blocks=BLOCKS[number])),
            )
        shape = Shape(4, 2, 64, 3, 9, 200) if on_gpu else Shape(2, 1, 64, 2, 2, 40)
        # one table entry for all launches: for a single token the launcher would choose another
        first = partial(launch, blocks=BLOCKS[candidates(dtype.itemsize)[0]])
        yield f"{name}: bits depend on nothing else", partial(independence, shape, dtype, device, first)
        if on_gpu and dtype != torch.float32:
            yield from _hopper_trials(dtype, device)


def _hopper_trials(dtype: torch.dtype, device: str) -> Iterator[Trial]:
    name = f"{str(dtype).removeprefix('torch.')} on Hopper"
    for shape in TILES:
        for what, ranges in (("any", random_ranges(shape)), ("full", full_ranges(shape))):
            yield f"{name}, {what} ranges: {shape}", partial(compare, shape, ranges, dtype, device, launch_on_hopper)
    for shape in (Shape(16, 2, 128, 3, 40, 900), Shape(14, 2, 64, 2, 30, 333)):
        trial = partial(independence, shape, dtype, device, launch_on_hopper)
        yield f"{name}, bits depend on nothing else: {shape}", trial
    yield f"{name}: masks do not change bits", partial(masks_change_nothing, dtype, device)


def masks_change_nothing(dtype: torch.dtype, device: str) -> Result:
    """Checks that text after tile tags has the same bits as without tags, in every run."""
    inputs = make_inputs(PREFILL, prompt_ranges(PREFILL), dtype, device)
    output = launch_on_hopper(inputs)
    if not all(launch_on_hopper(inputs).equal(output) for _ in range(5)):
        return Result(WRONG, note="the same inputs give other bits")
    text = (inputs.cross_ranges[0] == torch.tensor([0, PREFILL.cross_tokens], device=device)).all(-1)
    unmasked = inputs._replace(cross_ranges=full_ranges(PREFILL).to(device, torch.int32))
    same = launch_on_hopper(unmasked)[:, :, text].equal(output[:, :, text])
    return Result(PASSED if same else WRONG, note="" if same else "tags change the bits of text")
