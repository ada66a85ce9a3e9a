"""Tests the model repository of an engine for TensorRT against Triton's schema, the graphs and the profiles.

Runs without a GPU: checks that every name, type and shape is that with which the plan is built.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from tensorrt_engines import for_tensorrt
from tritonclient.grpc import model_config_pb2

from nvlm_trt.backends.plans.graphs import write_graphs
from nvlm_trt.backends.plans.profiles import profiles_of
from nvlm_trt.backends.table import find_backend
from nvlm_trt.builders.quantization.formats import WeightForm, quantised
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ServerError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.progress import no_progress
from nvlm_trt.serving.triton.repository import RepositoryOptions, placement_of, render_repository
from nvlm_trt.serving.triton.server import TritonServer
from nvlm_trt.serving.triton.shared_memory import SharedMemory

Directory = Callable[[str], Path]
Configs = dict[str, model_config_pb2.ModelConfig]
ONNX_TYPES = {
    onnx.TensorProto.FLOAT: model_config_pb2.TYPE_FP32,
    onnx.TensorProto.FLOAT16: model_config_pb2.TYPE_FP16,
    onnx.TensorProto.BFLOAT16: model_config_pb2.TYPE_BF16,
}


def render(engine: Engine, directory: Path) -> Configs:
    render_repository(engine, placement_of(engine), directory, 7, RepositoryOptions())
    return {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for folder in directory.iterdir()
    }


@pytest.fixture
def opened(engine: Directory) -> Engine:
    return Engine.open(engine("nvlm-h-tiny"))


@pytest.mark.parametrize("name", ["nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_vision_encoder_takes_and_gives_what_its_graph_does(
    engine: Directory, checkpoint: Directory, tmp_path: Path, name: str, dtype: str
) -> None:
    source = EngineSource(checkpoint(name), {})
    with Checkpoint.open(checkpoint(name)) as weights:
        recipe = quantised(weights, find_backend("tensorrt").precisions.parse(dtype), None, 0, form=WeightForm.TENSORRT)
    (tmp_path / "graphs").mkdir()
    path = write_graphs(source, recipe, dtype, tmp_path / "graphs", no_progress)["vision_encoder"]
    graph = onnx.load(path, load_external_data=False).graph
    config = render(for_tensorrt(Engine.open(engine(name)), dtype), tmp_path / "models")["vision_encoder"]
    for tensors, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values, strict=True):
            assert tensor.data_type == ONNX_TYPES[value.type.tensor_type.elem_type]
            batch, *rest = value.type.tensor_type.shape.dim
            assert batch.dim_param == "tiles"  # which Triton counts as the batch
            assert list(tensor.dims) == [dimension.dim_value for dimension in rest]


def test_batches_and_cuda_graphs_are_those_of_the_profile(opened: Engine, tmp_path: Path) -> None:
    config = render(for_tensorrt(opened, "bf16"), tmp_path)["vision_encoder"]
    (profile,) = profiles_of(opened.config, opened.limits)["vision_encoder"]
    fewest, usual, most = profile["pixel_values"]
    assert config.platform == "tensorrt_plan"
    assert config.max_batch_size == most[0] == usual[0]
    assert config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert (group.kind, list(group.gpus), list(group.profile)) == (group.KIND_GPU, [0], ["0"])
    assert config.optimization.cuda.graphs
    specs = config.optimization.cuda.graph_spec
    assert [spec.batch_size for spec in specs] == list(range(fewest[0], most[0] + 1))
    for spec in specs:
        assert {name: list(shape.dim) for name, shape in spec.input.items()} == {"pixel_values": most[1:]}
        assert not spec.HasField("graph_lower_bound")  # a graph runs its own batch only


def test_the_plan_is_where_triton_looks_for_it(opened: Engine, tmp_path: Path) -> None:
    render(for_tensorrt(opened, "bf16"), tmp_path)
    (file,) = (tmp_path / "vision_encoder" / "1").iterdir()
    assert file.name == "model.plan"
    assert file.readlink() == opened.path / "vision_encoder.plan"
    assert not (tmp_path / "vision_encoder_tensorrt").exists()


def test_image_tokens_stay_on_the_device(opened: Engine, tmp_path: Path) -> None:
    configs = render(for_tensorrt(opened, "bf16"), tmp_path)
    decoder = configs["nvlm"]
    assert decoder.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
    assert decoder.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    types = {tensor.name: tensor.data_type for tensor in decoder.input}
    assert types["image_tokens"] == configs["vision_encoder"].output[0].data_type == model_config_pb2.TYPE_BF16
    assert configs["tiling"].output[0].data_type == configs["vision_encoder"].input[0].data_type
    assert configs["tiling"].parameters["image_type"].string_value == "TYPE_BF16"


def test_the_ensemble_connects_the_models_as_for_onnx_runtime(opened: Engine, tmp_path: Path) -> None:
    portable, configs = render(opened, tmp_path / "cpu"), render(for_tensorrt(opened, "bf16"), tmp_path / "gpu")
    assert configs.keys() == portable.keys()
    assert configs["nvlm_ensemble"] == portable["nvlm_ensemble"]
    assert portable["vision_encoder"].backend == "python"
    assert portable["nvlm"].parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "yes"
    for name in ("tiling", "vision_encoder", "nvlm"):
        for kind in ("input", "output"):
            shapes = [
                [(tensor.name, list(tensor.dims), tensor.optional if kind == "input" else None) for tensor in tensors]
                for tensors in (getattr(portable[name], kind), getattr(configs[name], kind))
            ]
            assert shapes[0] == shapes[1], name
    engine = for_tensorrt(opened, "bf16")
    SharedMemory(engine, placement_of(engine), ImageLimits()).check()


def test_refuses_plans_without_weights(opened: Engine, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot refit; rebuild it without --strip-weights"):
        render(for_tensorrt(opened, "bf16", stripped=True), tmp_path)


def test_a_server_without_the_backend_names_the_container(opened: Engine, tmp_path: Path) -> None:
    """The tritonserver of the wheel is without it, too."""
    shutil.copytree(opened.path, tmp_path / "engine")
    for_tensorrt(opened, "bf16", tmp_path / "engine")
    server = TritonServer(tmp_path / "engine")
    with pytest.raises(ServerError, match=r"tritonserver lacks .* serve it in nvcr.io/nvidia/tritonserver:26.07-py3"):
        server.start()
