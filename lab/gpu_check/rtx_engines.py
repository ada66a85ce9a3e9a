"""Builds the engines that gpu_check's part for TensorRT-RTX runs, and computes the numbers that they must give.

    python -m lab.gpu_check.rtx_engines DIRECTORY

Needs TensorRT-RTX, the packages of a build, and no GPU. A machine that lacks these packages can run the engines:
`lab/gpu_check.sh --only rtx --rtx-engines DIRECTORY`. Only the same version of TensorRT-RTX reads them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.code_state import ROOT
from lab.gpu_check.rtx_numbers import LIMITS, TOLERANCES, run_steps

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvlm_trt.builders.graphs.streamed import StoredTensor
    from nvlm_trt.prompt.encoder import PromptEncoder

MODELS = tuple(f"nvlm-{architecture}-tiny" for architecture in "dxh")
BACKEND = "tensorrt-rtx"
# (text, repeated so often, columns of tiles in its image) of each slot
PROMPTS = (
    ("What is written in the second line of the picture?", 1, 2),
    ("Hello", 1, 0),
    ("Which city has the largest number? Answer with one word. ", 35, 1),
    ("The first word is Paris, the second is Rome. What is the first word? ", 120, 0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    given = options().parse_args(arguments)
    given.directory.mkdir(parents=True, exist_ok=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a build that sees a GPU would run the plans, which is the check's part
    write_masked_attention(given.directory)
    jobs = [(model, precision) for precision in given.precision for model in given.model]
    failed = 0
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        builds = [pool.submit(build, given.directory, model, precision, given.target) for model, precision in jobs]
        for (model, precision), future in zip(jobs, builds, strict=True):
            error = future.exception()
            failed += error is not None
            print(f"{model}, {precision}: {_first_line(error) if error else future.result()}", flush=True)
    return 1 if failed else 0


def engine_path(directory: Path, model: str, precision: str) -> Path:
    return directory / f"{model}-{precision}"


def numbers_path(directory: Path, model: str, precision: str) -> Path:
    """Name the file of the numbers that the engine must give."""
    return directory / f"{model}-{precision}.npz"


def attention_path(directory: Path) -> Path:
    return directory / "masked_attention.onnx"


def write_masked_attention(directory: Path) -> None:
    """Write a graph of one cross-attention block's attention alone, in the form of the product's decoders."""
    import onnx_ir as ir

    from nvlm_trt.builders.graphs.common import CACHE_OPSET, INT32, StageGraph
    from nvlm_trt.builders.graphs.cross_attention import MaskedAttention
    from nvlm_trt.model.presets import PRESETS

    llm = PRESETS["nvlm-x-72b"].llm
    graph = StageGraph("masked_attention", _NoWeights(), opset=CACHE_OPSET, dtype=ir.DataType.BFLOAT16)
    query = graph.input("query", graph.dtype, ["batch", llm.num_heads, "sequence", llm.head_dim])
    cache: list[int | str] = ["batch", llm.num_kv_heads, "cross_tokens", llm.head_dim]
    key, value = (graph.input(name, graph.dtype, cache) for name in ("key", "value"))
    ranges = graph.input("cross_ranges", INT32, ["batch", "sequence", 2])
    gate = graph.input("gate", graph.dtype, [1])
    attention = MaskedAttention(graph, llm, ranges, key)
    output = attention.attend(graph, query, key, value, gate)
    graph.output(output, "output", ["batch", llm.num_heads, "sequence", llm.head_dim])
    ir.save(graph.model(), attention_path(directory))


class _NoWeights:
    """Implements `WeightSource` for a graph without weights."""

    def take(self, name: str) -> StoredTensor:
        raise KeyError(name)


def build(directory: Path, model: str, precision: str, target: str | None = None) -> str:
    """Build one engine, and its numbers from the same graphs in ONNX Runtime. Returns a line about them.

    The numbers are written last: an engine without them is not whole."""
    import numpy as np

    from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine

    started = time.monotonic()
    checkpoint, output = ROOT / "checkpoints" / model, engine_path(directory, model, precision)
    with tempfile.TemporaryDirectory() as folder:
        name_package(Path(folder))
        quantization = QuantizationOptions(calibration=_samples(Path(folder)), gate=None)
        engine = build_engine(
            checkpoint,
            output,
            LIMITS,
            overwrite=True,
            smoke_test=False,
            precision=precision,
            quantization=quantization,
            backend=BACKEND,
            options={"target": target},
        )
        numbers = _expected(checkpoint, output, Path(folder))
    np.savez(numbers_path(directory, model, precision), **numbers)
    size = sum(record.size for record in engine.manifest.files.values()) / 1e6
    return f"{size:.0f} MB in {time.monotonic() - started:.0f} s"


def name_package(folder: Path, package: str = "nvlm-trt") -> None:
    """Give a package that is not installed a version, which the manifests of engines name; `folder` stays in
    sys.path."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        information = folder / f"{package.replace('-', '_')}-0.dist-info"
        information.mkdir()
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: 0+checkout\n"
        (information / "METADATA").write_text(text, encoding="utf-8")
        sys.path.append(str(folder))


def _samples(folder: Path) -> Path:
    """Write questions, one about an image, for the scales of int8 and fp8."""
    _picture(112, 56).save(folder / "picture.png")
    lines = [{"prompt": question * min(repeats, 4), "answer": "-"} for question, repeats, _ in PROMPTS]
    lines[0]["image"] = "picture.png"
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
    return path


def _expected(checkpoint: Path, built: Path, folder: Path) -> dict[str, Any]:
    """Run the graphs of an engine in ONNX Runtime, float32 between operators."""
    from nvlm_trt.backends.opening import open_backend
    from nvlm_trt.backends.tensorrt_rtx import SPEC
    from nvlm_trt.builders.build_steps import BuildJob
    from nvlm_trt.builders.engine_build import write_engine
    from nvlm_trt.builders.quantization.calibration import read_calibration
    from nvlm_trt.builders.quantization.formats import quantised
    from nvlm_trt.builders.source import EngineSource
    from nvlm_trt.checkpoint.reader import Checkpoint
    from nvlm_trt.engine import CALIBRATION, Engine
    from nvlm_trt.progress import no_progress

    manifest = Engine.open(built).manifest
    graphs = folder / "graphs"
    graphs.mkdir()
    source = EngineSource(checkpoint, LIMITS)
    steps = SPEC.build(BuildJob(source, dict(SPEC.build_options), graphs, graphs, no_progress)).trial
    assert steps is not None, "a GPU is visible"
    saved = built / CALIBRATION
    calibration = read_calibration(saved) if saved.exists() else None
    alpha = (manifest.calibration or {}).get("smoothquant_alpha", 0.0)
    with Checkpoint.open(checkpoint) as opened:
        recipe = quantised(opened, manifest.precision, calibration, alpha, steps.weight_form)
    write_engine(source, graphs, recipe, BACKEND, steps.tools, steps.write_stages)
    with open_backend(Engine.open(graphs)) as backend:
        given = _inputs(source.prompts)
        return given | run_steps(backend, given)


def _inputs(prompts: PromptEncoder) -> dict[str, Any]:
    """Encode the prompts of the slots: text like that of the checkpoints' training, for noise makes logits that hang on
    every rounding. The last prompt leaves room for one token."""
    from nvlm_trt.api import Message
    from nvlm_trt.image.tiling import tile_image

    config = prompts.config
    edge = config.vision.image_size
    given: dict[str, Any] = {}
    for slot, (question, repeats, columns) in enumerate(PROMPTS):
        tiles = [tile_image(_picture(columns * edge, edge), edge, config.max_tiles)] if columns else []
        given |= {f"pixels.{slot}": pixels for pixels in tiles}
        prompt = prompts.encode([Message("user", question * repeats)], [len(pixels) for pixels in tiles])
        last = LIMITS["max_seq_len"] - 1
        given |= {f"input_ids.{slot}": prompt.input_ids[-last:], f"cross_ranges.{slot}": prompt.cross_ranges[-last:]}
    return given


def _picture(width: int, height: int) -> Image:
    """Draw dark words on white."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).multiline_text((4, 2), "Total 47\nParis 12\nRome 9\nOslo 31", "black")
    return image


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="for engines and numbers, 400 MB")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, help="[all]")
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCES), default=list(TOLERANCES), help="[all]")
    parser.add_argument("--target", help="GPUs to build for, as sm80 [the default of TensorRT-RTX]")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=max(1, cores // 2), help="builds at once [%(default)s]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
