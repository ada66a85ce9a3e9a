"""Compiles a Triton kernel to PTX that a C++ program can launch, on any machine, without a GPU.

TensorRT stores the PTX in the engine and launches the kernel with its declared arguments. Triton 3.3 and later append
two pointers (global scratch and profile scratch), which TensorRT would not pass. This module removes the two pointers
from the entry after checking that nothing reads them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

# PTX of CUDA 12.8, the oldest that knows sm_100a, so that drivers as old as possible take it.
PTX_VERSION = 87


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """`ptx` with its entry `name`: launch it with `threads` per block and `shared_bytes` of dynamic shared memory."""

    name: str
    ptx: str
    threads: int
    shared_bytes: int


def compile_kernel(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], capability: int, options: dict[str, Any]
) -> CompiledKernel:
    """Compile a @triton.jit function for one compute capability (80, 90, 100, ...; from 90 on for the "a" targets).

    `arguments`: run-time argument -> Triton's type ("*fp16", "i32", ...) in the order of the kernel's signature. The
    compiler assumes that pointers are 16-byte aligned. `constants`: the values of the kernel's tl.constexpr parameters.
    `options` are Triton's: num_warps, num_stages, maxnreg.
    Raises ValueError for a kernel that needs scratch memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(arguments.values()) if kind.startswith("*")
    }
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {**options, "ptx_version": PTX_VERSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = compiled.metadata
    ptx = strip_hidden_parameters(compiled.asm["ptx"], len(arguments))
    return CompiledKernel(metadata.name, ptx, metadata.num_warps * metadata.warp_size, metadata.shared)


def strip_hidden_parameters(ptx: str, declared: int) -> str:
    """Remove the parameters after the first `declared` from PTX with one entry.

    Raises ValueError for fewer parameters, or for a parameter to remove that is no pointer or that the kernel reads."""
    entry = re.search(r"\.visible \.entry \w+\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    parameters = [parameter.strip() for parameter in entry.group(1).split(",")] if entry else []
    if entry is None or len(parameters) < declared:
        raise ValueError(f"PTX has an entry with {len(parameters)} parameters; {declared} are declared")
    for parameter in parameters[declared:]:
        name = parameter.split()[-1]
        if ".u64" not in parameter or ".ptr" not in parameter:
            raise ValueError(f"hidden parameter {parameter!r} is not a pointer; this Triton version is not supported")
        if len(re.findall(rf"\b{re.escape(name)}\b", ptx)) != 1:
            raise ValueError(f"hidden parameter {name} is read by the kernel, which TensorRT cannot supply")
    kept = ",\n\t".join(parameters[:declared])
    return f"{ptx[: entry.start(1)]}{kept}{ptx[entry.end(1) :]}"
