"""Tests the rendered model repository, read with Triton's own schema of config.pbtxt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from nvlm_trt.engine import Engine
from nvlm_trt.errors import ServerError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.machine import available_cores
from nvlm_trt.serving.chat_tensors import PACKED_ONLY
from nvlm_trt.serving.triton import shared_memory
from nvlm_trt.serving.triton.models.parameters import image_limits
from nvlm_trt.serving.triton.repository import (
    RepositoryOptions,
    placement_of,
    render_repository,
)
from nvlm_trt.serving.triton.shared_memory import SharedMemory

MODELS = {"tiling", "vision_encoder", "nvlm", "image_encoder", "nvlm_ensemble"}
ENSEMBLES = {
    "image_encoder": ["tiling", "vision_encoder"],
    "nvlm_ensemble": ["tiling", "vision_encoder", "nvlm"],
}
Configs = dict[str, model_config_pb2.ModelConfig]


@pytest.fixture
def opened(engine: Callable[[str], Path]) -> Engine:
    return Engine.open(engine("nvlm-h-tiny"))


def render(engine: Engine, directory: Path, options: RepositoryOptions | None = None) -> Configs:
    placement = placement_of(engine)
    render_repository(engine, placement, directory, 7, options or RepositoryOptions())
    return {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for folder in directory.iterdir()
    }


def parameter(config: model_config_pb2.ModelConfig, name: str) -> str:
    return config.parameters[name].string_value


def test_every_model_is_rendered_with_its_code(opened: Engine, tmp_path: Path) -> None:
    configs = render(opened, tmp_path)
    assert configs.keys() == MODELS
    for name, config in configs.items():
        assert config.name == name
        assert (tmp_path / name / "1").is_dir()
        assert (tmp_path / name / "1" / "model.py").is_file() == (config.backend == "python")


def test_shapes_are_those_of_the_engine(opened: Engine, tmp_path: Path) -> None:
    configs = render(opened, tmp_path)
    model = opened.config
    encoder = configs["vision_encoder"]
    assert list(encoder.input[0].dims) == [3, model.vision.image_size, model.vision.image_size]
    assert list(encoder.output[0].dims) == [model.tokens_per_tile, model.llm.hidden_size]
    assert encoder.max_batch_size == 4 * (opened.limits.max_tiles + 1)
    assert encoder.HasField("dynamic_batching")
    assert configs["nvlm"].model_transaction_policy.decoupled


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_connects_tensors_that_exist_and_agree(opened: Engine, tmp_path: Path, name: str) -> None:
    configs = render(opened, tmp_path)
    ensemble = configs[name]
    steps = ensemble.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ENSEMBLES[name]
    types = {tensor.name: tensor.data_type for tensor in ensemble.input}
    for step in steps:
        inputs = {tensor.name: tensor for tensor in configs[step.model_name].input}
        outputs = {tensor.name: tensor for tensor in configs[step.model_name].output}
        for key, tensor in step.input_map.items():
            assert inputs[key].data_type == types[tensor], (step.model_name, key)
        required = {key for key, tensor in inputs.items() if not tensor.optional}
        assert required <= step.input_map.keys()
        types |= {tensor: outputs[key].data_type for key, tensor in step.output_map.items()}
    assert {tensor.name: tensor.data_type for tensor in ensemble.output}.items() <= types.items()
    if name == "nvlm_ensemble":
        answer = [tensor.name for tensor in configs["nvlm"].output if tensor.name != "count"]
        assert [tensor.name for tensor in ensemble.output] == answer


def test_paths_and_options_arrive_as_they_are(opened: Engine, tmp_path: Path) -> None:
    odd = tmp_path / 'it\'s "an" engine, 5$ ${x} \\n ü'
    shutil.copytree(opened.path, odd)
    limits = ImageLimits(max_pixels=7, max_images=2)
    options = RepositoryOptions(threads=3, max_queue=5, reuse_prompts=False, image_limits=limits)
    configs = render(Engine.open(odd), tmp_path / "models", options)
    for name in ("vision_encoder", "nvlm"):
        assert parameter(configs[name], "engine") == str(odd)
        assert parameter(configs[name], "threads") == "3"
    assert parameter(configs["nvlm"], "max_queue") == "5"
    assert parameter(configs["nvlm"], "reuse_prompts") == "no"
    assert parameter(configs["nvlm"], "drain_descriptor") == "7"
    for name in ("tiling", "nvlm"):
        assert (parameter(configs[name], "max_pixels"), parameter(configs[name], "max_images")) == ("7", "2")


def test_the_budget_of_an_image_arrives_as_it_is(opened: Engine, tmp_path: Path) -> None:
    limits = ImageLimits(max_decode_seconds=0.25, max_decode_memory=3 << 30)
    configs = render(opened, tmp_path, RepositoryOptions(image_limits=limits))
    for name in ("tiling", "nvlm"):
        parameters = {key: value.string_value for key, value in configs[name].parameters.items()}
        assert image_limits(parameters) == limits
    assert parameter(configs["nvlm"], "decode_workers") == str(configs["tiling"].instance_group[0].count)


def test_only_nvlm_uses_the_version_of_tiling_that_never_decodes(opened: Engine, tmp_path: Path) -> None:
    configs = render(opened, tmp_path)
    assert configs["tiling"].version_policy.HasField("all")
    versions = {name: configs[name].ensemble_scheduling.step[0].model_version for name in ENSEMBLES}
    assert versions == {"image_encoder": int(PACKED_ONLY), "nvlm_ensemble": 1}
    for version in ("1", PACKED_ONLY):
        assert (tmp_path / "tiling" / version / "model.py").is_file()


def test_threads_are_the_cores_at_hand(opened: Engine, tmp_path: Path) -> None:
    assert parameter(render(opened, tmp_path)["nvlm"], "threads") == str(available_cores())


def test_too_little_shared_memory_is_an_error(opened: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SharedMemory(opened, placement_of(opened), ImageLimits())
    memory.check()
    monkeypatch.setattr(shared_memory, "_SHARED_MEMORY_SLACK", 1 << 60)
    with pytest.raises(ServerError, match="--shm-size"):
        memory.check()
