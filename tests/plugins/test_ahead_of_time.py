"""Compiles kernels for GPUs that this machine need not have, and assembles them by NVIDIA's assembler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from assembly import TARGETS, assemble, entry_parameters

from nvlm_trt.plugins.ahead_of_time import compile_kernel, strip_hidden_parameters
from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS, candidates
from nvlm_trt.plugins.gated_cross_attention.tensorrt_plugin import SHARED_LIMIT, compile_tactic

TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
# Every GPU from compute capability 8.0 on grants a program this much on request (99 KB on 8.6 and 8.9).
SHARED_LIMIT_ASKED = 99 << 10


@pytest.fixture(autouse=True)
def fresh_triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install 'nvlm-trt[test]'")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "tactic"),
    [
        *((90, "bf16", 128, tactic) for tactic in candidates(2)),
        *((80, "bf16", 128, tactic) for tactic in (1, 4, 5)),
        *((100, "bf16", 128, tactic) for tactic in (1, 4)),
        *((capability, "fp32", 128, 1) for capability in TARGETS),
        (80, "fp16", 64, 4),
        (90, "fp16", 64, 1),
        (90, "fp16", 80, 3),
        (90, "bf16", 96, 4),
        (100, "fp16", 64, 3),
    ],
)
def test_attention_assembles(capability: int, dtype: str, head_dim: int, tactic: int, tmp_path: Path) -> None:
    kernel = compile_tactic.__wrapped__(dtype, 64, 8, head_dim, tactic, capability)
    assert f".target {TARGETS[capability]}" in kernel.ptx
    assert entry_parameters(kernel.ptx) == "pppppiip"
    assert kernel.threads == 32 * BLOCKS[tactic].warps
    if dtype != "fp32":
        # 16 rows are fewer than the newer instructions take
        assert (TENSOR_CORE[capability] if BLOCKS[tactic].rows > 16 else "mma.sync") in kernel.ptx
    assert kernel.shared_bytes <= (SHARED_LIMIT_ASKED if tactic in (2, 5) else SHARED_LIMIT)
    assert assemble(kernel.ptx, TARGETS[capability], tmp_path) <= 64


@pytest.mark.parametrize(("capability", "one_token"), [(80, True), (90, True), (100, True), (90, False)])
def test_attention_in_chunks_assembles(capability: int, one_token: bool, tmp_path: Path) -> None:
    from nvlm_trt.plugins.gated_cross_attention.split_kernel import add_chunks_kernel, attend_chunk_kernel

    blocks = BLOCKS[2]
    partial = dict.fromkeys(("peaks", "sums", "totals"), "*fp32")
    inputs = {**dict.fromkeys(("query", "key", "value"), "*bf16"), "cross_ranges": "*i32"}
    arguments = {**inputs, **dict.fromkeys(("tokens", "cross_tokens", "rows"), "i32"), **partial}
    head = {"HEAD_DIM": 128, "PADDED_DIM": 128}
    sizes = {"ROWS": 16, "KEYS": blocks.keys(128, 2), "CHUNK": blocks.chunk, "ONE_TOKEN": one_token}
    early = capability >= 90
    constants = {"HEADS": 64, "KV_HEADS": 8, **head, **sizes, "EARLY": early}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    kernel = compile_kernel(attend_chunk_kernel, arguments, constants, capability, options)
    assert "mma.sync" in kernel.ptx
    assert_waits_before_it_reads(kernel.ptx, early)
    assert kernel.shared_bytes <= SHARED_LIMIT_ASKED
    assert assemble(kernel.ptx, TARGETS[capability], tmp_path) <= (8 if capability == 90 and one_token else 0)

    arguments = {**partial, "gate": "*bf16", "chunks": "i32", "rows": "i32", "output": "*bf16"}
    constants = {**head, "CHUNKS": 4, "EARLY": early}
    kernel = compile_kernel(add_chunks_kernel, arguments, constants, capability, {"num_warps": 1})
    assert_waits_before_it_reads(kernel.ptx, early)
    assert assemble(kernel.ptx, TARGETS[capability], tmp_path) == 0


def assert_waits_before_it_reads(ptx: str, early: bool) -> None:
    """Assert that a kernel that starts early touches no memory before the kernel in front has ended."""
    before, wait, after = ptx.partition("griddepcontrol.wait")
    assert bool(wait) == early
    if early:
        assert not re.search(r"\b(ld|st|cp)[.\w]*\.global", before)
        assert re.search(r"\bld[.\w]*\.global", after)


@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 128), ("fp16", 64)])
def test_attention_of_prompts_on_hopper_assembles(dtype: str, head_dim: int, tmp_path: Path) -> None:
    """The products overlap: ptxas warns if it has to put products one after the other."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from nvlm_trt.plugins.gated_cross_attention.hopper.kernel import OPTIONS, prefill_kernel

    block = [1, 128, head_dim]
    descriptor = f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, gl.float16)!r}>"
    signature = dict.fromkeys(prefill_kernel.arg_names, f"*{dtype}") | {"cross_ranges": "*i32"}
    signature |= dict.fromkeys(("key_blocks", "value_blocks"), descriptor)
    signature |= dict.fromkeys(("tokens", "cross_tokens", "key_heads", "tiles"), "i32")
    constants = {"HEADS": 64, "KV_HEADS": 8, "HEAD_DIM": head_dim}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    indices = {(list(signature).index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fn=prefill_kernel, signature=signature, constexprs=indices, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    assert compiled.metadata.shared <= 227 << 10
    assert compiled.asm["ptx"].count("wgmma.mma_async") > 0
    assert_waits_before_it_reads(compiled.asm["ptx"], early=True)
    assert assemble(compiled.asm["ptx"], TARGETS[90], tmp_path) <= 160


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_tile_resample_assembles(capability: int, dtype: str, tmp_path: Path) -> None:
    from nvlm_trt.plugins.tile_resample.kernel import planes_kernel, tile_resample_kernel
    from nvlm_trt.plugins.tile_resample.launcher import BLOCK, SOURCE, WARPS

    tables = {
        "first_spans": "*i32",
        "first_weights": "*fp16",
        "second_spans": "*i32",
        "second_weights": "*fp16",
    }
    sizes = ("first_sources", "second_sources", "pitch", "plane", "columns", "rows")
    scalars = (*sizes, "tiles_vertical_first", "thumbnail_vertical_first")
    arguments = {"planes": "*u8", **tables, **dict.fromkeys(scalars, "i32"), "tiles": f"*{dtype}"}
    statistics = {f"{name}_{channel}": 0.5 for name in ("MEAN", "STD") for channel in "RGB"}
    constants = {**statistics, "TILE": 448, "BLOCK": BLOCK, "SOURCE": SOURCE, "ALIGN": 16}
    options = {"num_warps": WARPS, "num_stages": 1}
    kernel = compile_kernel(tile_resample_kernel, arguments, constants, capability, options)
    assert entry_parameters(kernel.ptx) == "pppppiiiiiiiip"
    assert kernel.shared_bytes <= SHARED_LIMIT
    # 2 warps spill registers that 4 warps would not, and were still faster on an H200
    assert assemble(kernel.ptx, TARGETS[capability], tmp_path) <= 1536

    integers = dict.fromkeys(("width", "words", "pitch", "plane"), "i32")
    arguments = {"image": "*u8", **integers, "planes": "*u8"}
    kernel = compile_kernel(planes_kernel, arguments, {"QUADS": 256}, capability, {"num_warps": 4})
    assert assemble(kernel.ptx, TARGETS[capability], tmp_path) == 0


def entry(*parameters: str, body: str = "ret;") -> str:
    return f".version 8.7\n.visible .entry kernel(\n\t{', '.join(parameters)}\n)\n{{\n{body}\n}}\n"


POINTERS = [f".param .u64 .ptr .global .align 1 kernel_param_{index}" for index in range(4)]


def test_strips_pointers_that_are_not_read() -> None:
    body = "ld.param.b64 %rd1, [kernel_param_0];\nld.param.b64 %rd2, [kernel_param_1];"
    stripped = strip_hidden_parameters(entry(*POINTERS, body=body), declared=2)
    assert [line.strip(" \t,") for line in stripped.splitlines() if ".param .u64" in line] == POINTERS[:2]
    assert stripped.endswith(f"\n)\n{{\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        (entry(*POINTERS, body="ld.param.b64 %rd1, [kernel_param_3];"), "kernel_param_3 is read"),
        (entry(*POINTERS[:2], ".param .u32 kernel_param_2"), "is not a pointer"),
        (entry(*POINTERS[:1]), "1 parameters; 2 are declared"),
        ("// nothing", "0 parameters; 2 are declared"),
    ],
)
def test_refuses_to_strip(ptx: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strip_hidden_parameters(ptx, declared=2)
