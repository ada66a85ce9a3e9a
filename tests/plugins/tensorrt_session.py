"""Does in Python what TensorRT's builder does with a plugin, in a process that has TensorRT's bindings and no builder.

Real: the decorators' checks, the plugin registry with its creator, format combinations, tactics, the classes of
descriptions. Stand-ins: the objects that only the builder makes, which are dimension expressions and the collectors of
launch parameters and scalar arguments.
"""

from __future__ import annotations

import dataclasses
import operator
from types import SimpleNamespace
from typing import Any


class Dimension:
    """trt.IDimensionExpr with a known value; `constant` says whether the value would be known at build time."""

    def __init__(self, value: int, constant: bool = True) -> None:
        self.value, self.constant = int(value), constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value


class ExprBuilder:
    """trt.IExprBuilder over Dimension."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value)

    def operation(self, operation: Any, first: Dimension, second: Dimension) -> Dimension:
        operations = {
            "SUM": operator.add,
            "PROD": operator.mul,
            "SUB": operator.sub,
            "FLOOR_DIV": operator.floordiv,
            "CEIL_DIV": lambda a, b: -(-a // b),
        }
        value = operations[operation.name](first.value, second.value)
        return Dimension(value, first.constant and second.constant)


@dataclasses.dataclass
class Taken:
    """The facts that the builder learns about one plugin node."""

    output_types: list[str]
    output_shape: list[int]
    combinations: list[list[tuple[str, str]]]  # per combination: (type, format) of each input and output
    tactics: list[int]
    launches: dict[int, dict[str, int]]  # tactic -> grid, block and shared memory
    scalars: dict[int, list[int]]  # tactic -> arguments between inputs and outputs
    kernels: dict[int, tuple[str, str]]  # tactic -> name, PTX


def take(capability: int, dtype: str, shapes: list[list[int]], dynamic: list[tuple[int, int]]) -> Taken:
    """Register the plugin and ask it everything that a build asks. `dynamic`: the (input, axis) not fixed at build."""
    import tensorrt as trt
    import tensorrt.plugin as trtp
    from tensorrt_bindings.plugin import _tensor

    from nvlm_trt.plugins.gated_cross_attention.onnx_function import NAME, PLUGIN_ATTRIBUTES
    from nvlm_trt.plugins.gated_cross_attention.tensorrt_plugin import PLUGIN_ID, register_plugin

    register_plugin(capability)
    register_plugin(capability)  # a second time does nothing
    assert trtp.op.nvlm_v1.GatedCrossAttention.plugin_id == PLUGIN_ID

    trt.IDimensionExpr, trt.DimsExprs = Dimension, lambda length: [None] * length
    _tensor.SymExprImpl = lambda expression: expression._expr.value

    # the ONNX parser looks a plugin up in this way, by the node's attributes
    version, namespace = PLUGIN_ATTRIBUTES["plugin_version"], PLUGIN_ATTRIBUTES["plugin_namespace"]
    creator = trt.get_plugin_registry().get_creator(NAME, version, namespace)
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(NAME, namespace, trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, request)

    floating = getattr(trt.DataType, dtype)
    types = [floating] * 3 + [trt.DataType.INT32, floating]
    output_types = plugin.get_output_data_types(types, [len(shape) for shape in shapes])
    expressions = [
        [Dimension(size, (index, axis) not in dynamic) for axis, size in enumerate(shape)]
        for index, shape in enumerate(shapes)
    ]
    (output,) = plugin.get_output_shapes(expressions, [], ExprBuilder())
    output_shape = [expression.value for expression in output]

    described = [
        _description(trt, shape, kind) for shape, kind in zip([*shapes, shapes[0]], [*types, floating], strict=True)
    ]
    flat = plugin.get_supported_format_combinations(described, len(shapes))
    combinations = [flat[i : i + len(described)] for i in range(0, len(flat), len(described))]
    plugin.configure_plugin(described[:-1], described[-1:])
    tactics = plugin.get_valid_tactics()

    taken = Taken(
        [kind.name for kind in output_types],
        output_shape,
        [[(item.type.name, item.format.name) for item in combination] for combination in combinations],
        tactics,
        {},
        {},
        {},
    )
    for tactic in tactics:
        plugin.set_tactic(tactic)
        launch, scalars = SimpleNamespace(), _Scalars()
        plugin.get_launch_params(expressions, described, len(shapes), launch, scalars, ExprBuilder())
        descriptions = [item.desc for item in described]
        taken.launches[tactic] = vars(launch)
        taken.scalars[tactic] = [scalars.values[i] for i in range(scalars.nbSymExprs)]
        name, ptx = plugin.get_kernel(descriptions[:-1], descriptions[-1:])
        taken.kernels[tactic] = name, ptx.decode()
    return taken


class _Scalars:
    """trt.ISymExprs"""

    nbSymExprs = 0  # noqa: N815, TensorRT's name

    def __init__(self) -> None:
        self.values: dict[int, int] = {}

    def __setitem__(self, index: int, value: int) -> None:
        self.values[index] = value


def _description(trt: Any, shape: list[int], kind: Any) -> Any:
    described = trt.DynamicPluginTensorDesc()
    plain = trt.PluginTensorDesc()
    plain.dims, plain.type, plain.format = trt.Dims(shape), kind, trt.TensorFormat.LINEAR
    described.desc = plain
    described.min = described.opt = described.max = trt.Dims(shape)
    return described
