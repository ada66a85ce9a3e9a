"""Tests how faults of ONNX Runtime's kernels on CPUs without VNNI or AVX-512 are predicted and avoided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from nvlm_trt.backends.onnxruntime import cpu
from nvlm_trt.backends.onnxruntime.cpu_graph import rewritten
from nvlm_trt.backends.onnxruntime.session import open_session, session_options
from nvlm_trt.errors import EngineError

VNNI, AVX2 = {"avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}, {"avx2"}
INPUTS, OUTPUTS = 96, 40
RNG = np.random.default_rng(0)
BYTES = RNG.integers(200, 256, (300, INPUTS)).astype(np.uint8)  # large: pairs of products do not fit into 16 bits
WEIGHTS = RNG.integers(100, 128, (INPUTS, OUTPUTS)).astype(np.int8)
EXACT = (BYTES.astype(np.int64) - 128) @ WEIGHTS.astype(np.int64)
ROWS = RNG.standard_normal((300, INPUTS), dtype=np.float32)


def integer_product(path: Path) -> Path:
    """x uint8 [n, INPUTS] -> y [n, OUTPUTS], by way of an If; its weights lie beside the file."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        product (uint8[n, 96] x, bool take) => (float[n, 40] y)
        <float one = {1}, float[40] scales, int8[96, 40] weights, uint8 zero = {128}, float none = {0}> {
            y = If (take) <
                then_branch = then () => (float[n, 40] product) {
                    product = com.microsoft.MatMulIntegerToFloat (x, weights, one, scales, zero)
                },
                else_branch = otherwise () => (float[n, 40] other) { other = Cast <to = 1> (x) }
            >
        }""")
    values = {"weights": WEIGHTS, "scales": np.ones(OUTPUTS, np.float32)}
    return save(model, values, path)


def four_bit_product(path: Path) -> Path:
    """x [..., INPUTS] -> y [..., OUTPUTS]; its weights lie beside the file."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1, "nvlm": 1]>
        product (float[a, b, 96] x) => (float[a, b, 40] y) <uint8[40, 3, 16] values, float[40, 3] scales> {
            y = com.microsoft.MatMulNBits <K = 96, N = 40, bits = 4, block_size = 32, accuracy_level = 4>
                (x, values, scales)
        }""")
    rng = np.random.default_rng(1)
    values = {
        "values": rng.integers(0, 256, (OUTPUTS, 3, 16)).astype(np.uint8),
        "scales": rng.standard_normal((OUTPUTS, 3), dtype=np.float32),
    }
    return save(model, values, path)


def save(model: onnx.ModelProto, values: dict[str, np.ndarray], path: Path) -> Path:
    del model.graph.value_info[:]  # as which the parser takes initializers without values
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in values.items())
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0, convert_attribute=False)
    return path


def plain(model: Path | bytes, threads: int = 1, **entries: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options)


def rewritten_session(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """Opens the file as open_session does on a CPU with every fault."""
    model = rewritten(path, saturates=True, single_rows_differ=True)
    assert model is not None
    folder = {"model_external_initializers_file_folder_path": str(path.parent), "x64quantprecision": "1"}
    return plain(model.SerializeToString(), threads, **folder)


def multiply(session: onnxruntime.InferenceSession, x: np.ndarray) -> np.ndarray:
    return session.run(None, {"x": x} | ({"take": np.array(True)} if len(session.get_inputs()) == 2 else {}))[0]


def test_saturation_is_foreseen(tmp_path: Path) -> None:
    """On any CPU, plain ONNX Runtime is exact if and only if the product expects it to be."""
    y = multiply(plain(integer_product(tmp_path / "model.onnx")), BYTES)
    assert np.array_equal(y, EXACT) == (not cpu.saturates())


def test_other_bits_of_a_single_row_are_foreseen(tmp_path: Path) -> None:
    session = plain(four_bit_product(tmp_path / "model.onnx"))
    alone = np.concatenate([multiply(session, row[None, None])[0] for row in ROWS])
    assert np.array_equal(multiply(session, ROWS[None])[0], alone) == (not cpu.single_rows_differ())


def test_integer_products_are_exact(tmp_path: Path) -> None:
    """Opened as on this CPU, and as on a CPU that saturates."""
    path = integer_product(tmp_path / "model.onnx")
    for session in (open_session(path, session_options(1)), rewritten_session(path)):
        for rows in (1, 2, 7, 300):
            np.testing.assert_array_equal(multiply(session, BYTES[:rows]), EXACT[:rows])


@pytest.mark.parametrize("threads", [1, 2])
def test_4_bit_products_keep_a_rows_bits(tmp_path: Path, threads: int) -> None:
    """Threads take 128 rows each: 129 and 257 rows leave a single one. Rows are tokens of a sequence, or sequences."""
    path = four_bit_product(tmp_path / "model.onnx")
    many = multiply(plain(path, threads), ROWS[None])[0]  # the bits of plain ONNX Runtime for several rows
    for session in (open_session(path, session_options(threads)), rewritten_session(path, threads)):
        for rows in (1, 2, 3, 8, 127, 128, 129, 257, 300):
            np.testing.assert_array_equal(multiply(session, ROWS[None, :rows])[0], many[:rows])
            np.testing.assert_array_equal(multiply(session, ROWS[:rows, None])[:, 0], many[:rows])
        assert multiply(session, ROWS[None, :0]).shape == (1, 0, OUTPUTS)


@pytest.mark.parametrize(
    ("flags", "saturates", "single_rows_differ"),
    [
        (VNNI, False, False),
        (AVX2, True, True),
        (VNNI - {"avx512_vnni"}, True, False),
        (AVX2 | {"avx_vnni"}, False, True),
        (set(), True, True),
    ],
)
def test_faults_by_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], saturates: bool, single_rows_differ: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "flags", lambda: frozenset(flags))
    assert (cpu.saturates(), cpu.single_rows_differ()) == (saturates, single_rows_differ)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert (cpu.saturates(), cpu.single_rows_differ()) == (False, False)


@pytest.mark.parametrize("flags", [VNNI, AVX2])
def test_cpus_with_vnni_get_neither_the_option_nor_another_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: set[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "flags", lambda: frozenset(flags))
    path, options = four_bit_product(tmp_path / "model.onnx"), session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    open_session(path, options)
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    if flags == VNNI:
        assert operators == ["MatMulNBits"]
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert "Concat" in operators
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_other_graphs_are_left_alone(tmp_path: Path) -> None:
    path = integer_product(tmp_path / "model.onnx")
    assert rewritten(path, saturates=False, single_rows_differ=True) is None
    path = four_bit_product(tmp_path / "model.onnx")
    assert rewritten(path, saturates=True, single_rows_differ=False) is None


@pytest.mark.parametrize("content", [None, b"", b"no model: MatMulNBits, MatMulIntegerToFloat"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineError, match=r"model\.onnx cannot be loaded"):
        open_session(path, session_options(1))
