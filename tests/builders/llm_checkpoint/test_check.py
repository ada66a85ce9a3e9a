"""The strict check of a checkpoint: each fault is one line that names the file and the tensor or the key."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from split_models import SplitModel

from nvlm_trt.builders.tensorrt_llm.mapping import Mapping
from nvlm_trt.builders.tensorrt_llm_checkpoint import check_llm_checkpoint
from nvlm_trt.errors import EngineError

Tensors = dict[str, torch.Tensor]
LAYER = "transformer.layers.1"


@pytest.fixture
def written(tmp_path: Path, split_model: Callable[[str], SplitModel]) -> Path:
    """The ranks of an X in fp8."""
    model, mapping = split_model("X"), Mapping(2, 1)
    model.write(tmp_path, model.quantization("fp8", mapping), mapping)
    check_llm_checkpoint(tmp_path, model.config)
    return tmp_path


def refuse(directory: Path, model: SplitModel, message: str) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        check_llm_checkpoint(directory, model.config)
    assert "\n" not in str(raised.value)


def to(dtype: torch.dtype, *names: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype) for name in names})


def put(name: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (
        lambda tensors: tensors.pop(f"{LAYER}.mlp.gate.weight"),
        r"rank1\.safetensors has no tensor transformer\.layers\.1\.mlp\.gate\.weight",
    ),
    "extra": (
        lambda tensors: tensors.update(extra=torch.ones(1)),
        r"rank1\.safetensors has the tensor extra, which this rank does not use",
    ),
    "shape": (
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][1:]}),
        r"rank1\.safetensors: lm_head\.weight has shape \[256, 256\], this rank needs \[257, 256\]",
    ),
    "dtype of a weight": (
        to(torch.bfloat16, f"{LAYER}.attention.qkv.weight"),
        r"qkv\.weight is BF16, this rank needs F8_E4M3",
    ),
    "dtype of a norm": (to(torch.float32, "transformer.ln_f.weight"), r"ln_f\.weight is F32, this rank needs BF16"),
    "dtype of a scale": (
        to(torch.float16, f"{LAYER}.mlp.fc.weights_scaling_factor"),
        r"mlp\.fc\.weights_scaling_factor is F16, this rank needs F32",
    ),
    "NaN": (put(f"{LAYER}.mlp.fc.weights_scaling_factor", torch.nan), r"fc\.weights_scaling_factor .*not finite"),
    "infinity": (
        put(f"{LAYER}.mlp.gate.activation_scaling_factor", torch.inf),
        r"gate\.activation_scaling_factor .*not finite",
    ),
    "zero": (
        put(f"{LAYER}.mlp.proj.activation_scaling_factor", 0),
        r"proj\.activation_scaling_factor has 0\.0 at 0, scales are positive",
    ),
}


@pytest.mark.parametrize("fault", list(TENSOR_FAULTS))
def test_a_wrong_tensor(written: Path, split_model: Callable[[str], SplitModel], fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    path = written / "rank1.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refuse(written, split_model("X"), message)


CONFIG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a key is missing": (lambda config: config.pop("rotary_base"), "config.json has no rotary_base"),
    "a key is not ours": (lambda config: config.update(rotary_bass=1), "has the key rotary_bass"),
    "another value": (lambda config: config.update(norm_epsilon=1e-5), "norm_epsilon is 1e-05, this model needs 1e-06"),
    "1 for true": (lambda config: config.update(attn_bias=1), "attn_bias is 1, this model needs True"),
    "another place": (
        lambda config: config.update(cross_attention_layers=[0, 3]),
        r"cross_attention_layers is \[0, 3\], this model needs \[0, 4\]",
    ),
    "no mapping": (lambda config: config.pop("mapping"), "mapping has no tp_size and pp_size"),
    "a mapping of text": (lambda config: config["mapping"].update(tp_size="2"), "mapping has no tp_size"),
    "another mapping": (lambda config: config["mapping"].update(tp_size=1, world_size=1), "rank1.safetensors is of no"),
    "a wrong world": (lambda config: config["mapping"].update(world_size=4), "mapping is .*'world_size': 4"),
    "no rank": (lambda config: config["mapping"].update(tp_size=4, world_size=4), "rank0.safetensors: .*has shape"),
    "an unknown dtype": (lambda config: config.update(dtype="float32"), "dtype is not bfloat16 or float16"),
    "an algorithm that is not ours": (
        lambda config: config["quantization"].update(quant_algo="W4A16_AWQ"),
        "quant_algo 'W4A16_AWQ' with kv_cache_quant_algo None is not ours",
    ),
    "a key of quantization": (lambda config: config["quantization"].update(group_size=64), "quantization is"),
    "cross-attention is not excluded": (
        lambda config: config["quantization"].update(exclude_modules=["*lm_head", "*vocab_embedding"]),
        r"exclude_modules does not begin with \*lm_head, \*vocab_embedding, \*cross_attention\*",
    ),
    "no length": (lambda config: config.pop("max_encoder_input_len"), "max_encoder_input_len is not a number"),
}


@pytest.mark.parametrize("fault", list(CONFIG_FAULTS))
def test_a_wrong_config(written: Path, split_model: Callable[[str], SplitModel], fault: str) -> None:
    change, message = CONFIG_FAULTS[fault]
    path = written / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    refuse(written, split_model("X"), message)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"dtype": NaN}', "\xff"])
def test_a_config_that_is_no_config(written: Path, split_model: Callable[[str], SplitModel], text: str) -> None:
    (written / "config.json").write_text(text, encoding="latin-1")
    refuse(written, split_model("X"), r"config\.json (is not JSON|does not hold)")


def test_missing_files(written: Path, split_model: Callable[[str], SplitModel]) -> None:
    (written / "rank1.safetensors").rename(written / "rank2.safetensors")
    refuse(written, split_model("X"), r"rank2\.safetensors is of no rank of 2 x 1 GPUs; remove it")
    (written / "rank2.safetensors").unlink()
    refuse(written, split_model("X"), r"a rank is missing or damaged: .*rank1\.safetensors is missing")
    (written / "config.json").unlink()
    refuse(written, split_model("X"), r"cannot read .*config\.json \(No such file")


def test_a_rank_that_is_cut_off(written: Path, split_model: Callable[[str], SplitModel]) -> None:
    path = written / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(written, split_model("X"), r"a rank is missing or damaged: .*rank0\.safetensors is not a whole")


def test_the_checkpoint_of_another_model(written: Path, split_model: Callable[[str], SplitModel]) -> None:
    refuse(written, split_model("H"), "architecture is 'NVLM_X', this model needs 'NVLM_H'")


def test_the_check_needs_no_extra(written: Path, split_model: Callable[[str], SplitModel]) -> None:
    code = """
import sys
from pathlib import Path
sys.modules |= dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "ml_dtypes", "torch"))
from nvlm_trt.builders.tensorrt_llm.check import check_llm_checkpoint
from nvlm_trt.model.hf_config import read_config
check_llm_checkpoint(Path(sys.argv[1]), read_config(Path(sys.argv[2])))
"""
    command = [sys.executable, "-c", code, str(written), str(split_model("X").checkpoint)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
