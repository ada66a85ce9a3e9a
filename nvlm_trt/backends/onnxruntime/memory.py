"""Says how ONNX Runtime and OpenVINO hold weights on the CPU, from measurements (`python -m lab.engine_memory`)."""

from __future__ import annotations

from nvlm_trt.backends.openvino import ENCODE_TILES
from nvlm_trt.backends.spec import EncoderMemory, Loaded, Weight

_BF16, _FP32 = 2, 4
OVERHEAD = 10_000_000  # bytes of a session of ONNX Runtime
_TRANSFORMER = "vision_encoder"  # its component; the projector is another


def load(weight: Weight) -> Loaded:
    """ONNX Runtime packs a copy of what it multiplies, and drops the pages of the file that it has copied. Everything
    else stays in the mapped file, the rows of the embedding table that are looked up too."""
    if weight.multiplied:
        return Loaded(weight.nbytes)
    return Loaded(weight.nbytes if weight.tied else 0, weight.nbytes)


def _load_openvino(weight: Weight) -> Loaded:
    """OpenVINO keeps the file mapped, and packs a copy of what it multiplies, in 8 bits or bf16.

    It also multiplies the floating-point weights of a transformer layer by the scale in front of them, or behind them,
    and keeps these products in float32."""
    if not weight.multiplied:
        return Loaded(0, weight.nbytes)
    scaled = 0 if weight.quantised or weight.component != _TRANSFORMER else _FP32 * weight.numbers
    return Loaded(_read_openvino(weight) + scaled, weight.nbytes)


def _read_openvino(weight: Weight) -> int:
    return weight.nbytes if weight.quantised else _BF16 * weight.numbers


OPENVINO_ENCODER = EncoderMemory(_load_openvino, _read_openvino, _BF16, ENCODE_TILES, overhead=60_000_000)
