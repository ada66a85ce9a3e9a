"""The tasks of lm-eval and lmms-eval ask what `nvlm-trt eval` asks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.clients.lm_eval import tinydocs as lm_eval
from lab.clients.lmms_eval import tinydocs as lmms_eval
from nvlm_trt.api import Message
from nvlm_trt.prompt.conversation import place_images

CLIENTS = Path(lm_eval.__file__).parents[1]
IMAGE = None  # as in a turn's parts
Turn = list[str | None]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns one sample of every task, with the keys that a table of all samples has."""
    folder = tmp_path_factory.mktemp("tinydocs") / "samples"
    command = [sys.executable, "-m", "nvlm_trt.cli", "tinydocs", "--count", "1", "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    lm_eval.FOLDER = lmms_eval.FOLDER = folder
    written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{"image": None, "images": None, **sample} for sample in written]


def joined(parts: Turn) -> Turn:
    """Joins neighbouring texts."""
    turn: Turn = []
    for part in parts:
        if part is not IMAGE and turn and turn[-1] is not IMAGE:
            turn[-1] += part
        else:
            turn.append(part)
    return [part for part in turn if part != ""]


def asked_by_eval(sample: dict[str, Any], images: int) -> Turn:
    (turn,) = place_images([Message("user", sample["prompt"])], images)
    return joined([*turn.parts])


def test_prompts(samples: list[dict[str, Any]]) -> None:
    assert {len(lm_eval.images(sample)) for sample in samples} == {0, 1, 2}
    for sample in samples:
        images = [image.tobytes() for image in lm_eval.images(sample)]
        (message,) = lmms_eval.messages(sample)
        content = message["content"]
        assert [part["url"].tobytes() for part in content if part["type"] == "image"] == images
        parts: Turn = [part["text"] if part["type"] == "text" else IMAGE for part in content]
        assert joined(parts) == asked_by_eval(sample, len(images)), sample["name"]
        if len(images) < 2:  # lm-eval puts nothing between images
            parts = [*[IMAGE] * len(images), lm_eval.prompt(sample)]
            assert joined(parts) == asked_by_eval(sample, len(images)), sample["name"]


@pytest.mark.parametrize("client", ["lm_eval", "lmms_eval"])
def test_functions_of_a_task_exist(client: str) -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: ("function", loader.construct_scalar(node)))
    task = yaml.load((CLIENTS / client / "tinydocs.yaml").read_text(), Loader)
    assert task["dataset_kwargs"]["data_files"]["test"] == "/tmp/tinydocs/samples.jsonl"
    module = {"lm_eval": lm_eval, "lmms_eval": lmms_eval}[client]
    functions = [value[1].split(".") for value in task.values() if isinstance(value, tuple)]
    assert functions
    assert all(file == "tinydocs" and callable(getattr(module, name)) for file, name in functions)
