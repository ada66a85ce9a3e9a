"""Makes nvlm::GatedCrossAttention a TensorRT plugin whose kernel is compiled ahead of time into the engine.

At run time, an engine with this plugin needs neither Python nor a plugin library. The plugin is written against
TensorRT 11.4 (`tensorrt.plugin`, "quickly deployable plugins"): a plugin is one kernel without workspace, launched with
the inputs, then 32-bit integers, then the output.
"""

# No `from __future__ import annotations`: TensorRT reads the annotations of registered functions as classes.
import functools

from nvlm_trt.plugins.ahead_of_time import CompiledKernel, compile_kernel
from nvlm_trt.plugins.gated_cross_attention.blocks import BLOCKS, HEAD_DIMS, candidates, padded_dim
from nvlm_trt.plugins.gated_cross_attention.onnx_function import NAME, PLUGIN_ATTRIBUTES

PLUGIN_ID = f"{PLUGIN_ATTRIBUTES['plugin_namespace']}::{NAME}"
# More shared memory needs a driver call, which TensorRT is not documented to make for such a plugin.
SHARED_LIMIT = 48 << 10

_registered_for: int | None = None


def register_plugin(capability: int) -> None:
    """Register the plugin with TensorRT in this process, for engines that run on GPUs of compute capability
    `capability` (90 for 9.0). Call this before parsing a network. A second call with the same capability does nothing.

    Raises ImportError without tensorrt or triton, and ValueError if the plugin is registered for another capability:
    TensorRT keeps the first registration of a name. A later build raises ValueError if heads, head size or type do not
    fit."""
    global _registered_for
    if _registered_for == capability:
        return
    if _registered_for is not None:
        raise ValueError(
            f"{PLUGIN_ID} is registered for compute capability {_registered_for}; "
            f"build for {capability} in a process of its own"
        )
    _register(capability)
    _registered_for = capability


def _register(capability: int) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    types = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16", trt.DataType.FLOAT: "fp32"}

    @trtp.register(PLUGIN_ID)
    def describe(
        query: trtp.TensorDesc,
        key: trtp.TensorDesc,
        value: trtp.TensorDesc,
        cross_ranges: trtp.TensorDesc,
        gate: trtp.TensorDesc,
    ) -> trtp.TensorDesc:
        return query.like()

    def kernel(query: trtp.TensorDesc, key: trtp.TensorDesc, tactic: int) -> CompiledKernel:
        heads, head_dim = (query.shape_expr[axis].constant_value() for axis in (1, 3))
        kv_heads = key.shape_expr[1].constant_value()
        return compile_tactic(types[query.dtype], heads, kv_heads, head_dim, tactic, capability)

    @trtp.autotune(PLUGIN_ID)
    def combinations(
        query: trtp.TensorDesc,
        key: trtp.TensorDesc,
        value: trtp.TensorDesc,
        cross_ranges: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        # Networks are strongly typed, so only the query's type is possible. TensorRT times the tactics for each
        # optimisation profile.
        if query.dtype not in types:
            raise ValueError(f"{PLUGIN_ID}: query is {query.dtype.name}; it must be HALF, BF16 or FLOAT")
        combination = trtp.AutoTuneCombination()
        combination.pos([0, 1, 2, 4, 5], types[query.dtype].upper())
        combination.pos([3], "INT32")
        tactics = candidates(4 if types[query.dtype] == "fp32" else 2)
        combination.tactics([t for t in tactics if kernel(query, key, t).shared_bytes <= SHARED_LIMIT])
        return [combination]

    @trtp.aot_impl(PLUGIN_ID)
    def implementation(
        query: trtp.TensorDesc,
        key: trtp.TensorDesc,
        value: trtp.TensorDesc,
        cross_ranges: trtp.TensorDesc,
        gate: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
        compiled = kernel(query, key, tactic)
        batch, heads, tokens, _ = query.shape_expr
        kv_heads, cross_tokens = key.shape_expr[1], key.shape_expr[2]
        group = heads.constant_value() // kv_heads.constant_value()
        launch = trtp.KernelLaunchParams()
        launch.grid_x = batch * kv_heads
        launch.grid_y = trtp.cdiv(tokens * group, BLOCKS[tactic].rows)
        launch.block_x = compiled.threads
        launch.shared_mem = compiled.shared_bytes
        scalars = trtp.SymIntExprs.from_tuple((trtp.SymInt32(tokens), trtp.SymInt32(cross_tokens)))
        return compiled.name, compiled.ptx, launch, scalars


@functools.cache
def compile_tactic(
    dtype: str, heads: int, kv_heads: int, head_dim: int, tactic: int, capability: int
) -> CompiledKernel:
    """Compile the kernel with the table's block sizes `tactic`. `dtype`, also the gate's, is "fp16", "bf16" or "fp32".

    Raises ValueError for a number of heads or a head size that the kernel does not support."""
    from nvlm_trt.plugins.gated_cross_attention.kernel import gated_cross_attention_kernel

    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{PLUGIN_ID}: head size {head_dim} is not one of {HEAD_DIMS}")
    if heads % kv_heads:
        raise ValueError(f"{PLUGIN_ID}: {heads} heads are not a multiple of {kv_heads} key heads")
    blocks = BLOCKS[tactic]
    inputs = dict.fromkeys(("query", "key", "value"), f"*{dtype}")
    arguments = {**inputs, "cross_ranges": "*i32", "gate": f"*{dtype}"}
    arguments |= {"tokens": "i32", "cross_tokens": "i32", "output": f"*{dtype}"}
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim(head_dim),
        "ROWS": blocks.rows,
        "KEYS": blocks.keys(head_dim, 4 if dtype == "fp32" else 2),
    }
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return compile_kernel(gated_cross_attention_kernel, arguments, constants, capability, options)
