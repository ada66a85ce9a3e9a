"""Writes FP8 checkpoints as the compressed-tensors package and NVIDIA's ModelOpt do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
DECODER = "language_model.model.layers."
STATIC = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
DYNAMIC = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)


def quantised(name: str) -> bool:
    return name.startswith(DECODER) and name.endswith("_proj.weight")


def edit_config(directory: Path, **keys: object) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **keys}))


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def compress(source: Path, directory: Path, strategy: str, activations: QuantizationArgs) -> Tensors:
    """Write a checkpoint as compressed-tensors does. Returns the weights that the package decompresses, in float32."""
    shutil.copytree(source, directory)
    weights = QuantizationArgs(num_bits=8, type="float", strategy=strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    stored, expected = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not quantised(name):
            stored[name] = expected[name] = tensor
            continue
        dims = {"dim": 1, "keepdim": True} if strategy == "channel" else {}
        scale, _ = calculate_qparams(tensor.amin(**dims), tensor.amax(**dims), weights)
        module = FloatQuantizationCompressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        exact = {"weight": module["weight"], "weight_scale": scale.float()}
        expected[name] = FloatQuantizationCompressor.decompress(exact, scheme)["weight"]
        stored[name], stored[f"{name}_scale"] = module["weight"], module["weight_scale"]
        if not activations.dynamic:
            stored[name.replace(".weight", ".input_scale")] = torch.tensor([0.05])
    save_file(stored, directory / "model.safetensors")
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    edit_config(directory, quantization_config=json.loads(config.model_dump_json()))
    return {name: tensor.float() for name, tensor in expected.items()}


def write_modelopt(source: Path, directory: Path) -> Tensors:
    """Write what ModelOpt 0.47's export_hf_checkpoint wrote of a Qwen2: scales without dimensions of each weight and of
    its inputs; and the scales of a KV cache in FP8."""
    shutil.copytree(source, directory)
    stored, expected = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name], expected[name] = tensor, tensor.float()
        if quantised(name):
            scale = tensor.float().abs().amax() / 448
            stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"], stored[name.replace(".weight", ".input_scale")] = scale, torch.tensor(0.02)
            expected[name] = stored[name].float() * scale
        for part in "kv":
            if name.endswith(f"self_attn.{part}_proj.weight"):
                stored[name.replace("weight", f"{part}_scale")] = torch.tensor(1.0)
    save_file(stored, directory / "model.safetensors")
    return expected


def write_quant_config(directory: Path, algorithm: str = "FP8") -> None:
    found = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "vision_model*"]}
    text = json.dumps({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": found})
    (directory / "hf_quant_config.json").write_text(text)
