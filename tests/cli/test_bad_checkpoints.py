"""Checkpoints and adapters that cannot be built: `build` says what, where and what to do, and leaves nothing;
`inspect` names the same fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Run, assert_one_line_error
from safetensors.torch import load_file, save_file

Directory = Callable[[str], Path]
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAN = "language_model.model.layers.4.input_layernorm.weight"


@pytest.fixture
def sharded(checkpoint: Directory, tmp_path: Path) -> Path:
    """A checkpoint of two shards and an index, as most large ones are."""
    directory = Path(shutil.copytree(checkpoint("nvlm-d-tiny"), tmp_path / "checkpoint"))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for shard, part in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def rename_in_index(directory: Path, place: str) -> None:
    """Let the index lead to the second shard by another path."""
    text = (directory / INDEX).read_text().replace(SHARDS[1], place)
    (directory / INDEX).write_text(text)


def edit(directory: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    (shard,) = (shard for shard in SHARDS if name in load_file(directory / shard))
    tensors = load_file(directory / shard)
    change(tensors[name])
    save_file(tensors, directory / shard)


def edit_config(directory: Path, **keys: object) -> None:
    raw = json.loads((directory / "config.json").read_text())
    raw["llm_config"] |= keys
    (directory / "config.json").write_text(json.dumps(raw))


def enlarge_tokenizer(directory: Path) -> None:
    """Add tokens up to one behind the last row of the embedding table."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    last = tokenizer["added_tokens"][-1]
    more = [{**last, "id": number, "content": f"<more{number}>"} for number in range(last["id"] + 1, 513)]
    tokenizer["added_tokens"] += more
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


IN_HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (lambda d: (d / SHARDS[1]).unlink(), SHARDS[1]),
    "two indexes": (lambda d: shutil.copy(d / INDEX, d / "other.safetensors.index.json"), "has two indexes"),
    "an absolute path": (lambda d: rename_in_index(d, str(d / SHARDS[1])), "which is not a file beside it"),
    "a path upwards": (lambda d: rename_in_index(d, f"../{SHARDS[1]}"), "which is not a file beside it"),
    "an index and one file": (lambda d: shutil.copy(d / SHARDS[0], d / "model.safetensors"), "out of date"),
    "half a shard": (lambda d: (d / SHARDS[0]).write_bytes((d / SHARDS[0]).read_bytes()[:-1000]), SHARDS[0]),
    "a larger tokenizer": (enlarge_tokenizer, "vocab_size is 512"),
    "a larger vocabulary": (lambda d: edit_config(d, vocab_size=640), "config.json asks for [640, 192]"),
    "more layers": (lambda d: edit_config(d, num_hidden_layers=7), "has no tensor language_model.model.layers.6"),
}


@pytest.mark.parametrize("fault", IN_HEADERS)
def test_what_headers_and_side_files_show(run_cli: Run, sharded: Path, tmp_path: Path, fault: str) -> None:
    break_it, told = IN_HEADERS[fault]
    break_it(sharded)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run_cli("build", "--checkpoint", sharded, "--output", tmp_path / "engine")
    assert_one_line_error(result, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    status, out, _ = run_cli("inspect", sharded, "--json")
    assert status == 1
    assert any(told in found for found in json.loads(out)["faults"])


def test_a_number_that_is_not_finite(run_cli: Run, sharded: Path, tmp_path: Path) -> None:
    """Headers do not show it."""
    edit(sharded, NAN, lambda tensor: tensor.view(-1)[7].fill_(float("nan")))
    result = run_cli("build", "--checkpoint", sharded, "--output", tmp_path / "engine")
    assert_one_line_error(result, f"{NAN} has a value at [7] that is not finite")
    assert not (tmp_path / "engine").exists()
    assert run_cli("inspect", sharded)[0] == 0


def test_an_adapter_of_another_base(run_cli: Run, sharded: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "someone/larger"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    parts = {f"{module}.lora_A.weight": torch.ones(2, 8192), f"{module}.lora_B.weight": torch.ones(8192, 2)}
    save_file(parts, adapter / "adapter_model.safetensors")
    command = ("build", "--checkpoint", sharded, "--output", tmp_path / "engine", "--lora", adapter)
    assert_one_line_error(run_cli(*command), "is of another base", "'someone/larger'")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("place", ["/proc/engine", "/dev/null/engine"])
def test_a_place_that_takes_no_engine(run_cli: Run, sharded: Path, place: str) -> None:
    assert_one_line_error(run_cli("build", "--checkpoint", sharded, "--output", place), f"cannot write {place}")
