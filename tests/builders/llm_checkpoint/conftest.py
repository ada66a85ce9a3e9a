"""Fixtures for TensorRT-LLM's checkpoints: one set of small models for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from split_models import CONFIGS, VARIANTS, SplitModel


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are too small to share: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SplitModel]:
    """`split_model("X")` is the model of CONFIGS or VARIANTS of that name."""
    models: dict[str, SplitModel] = {}

    def make(name: str) -> SplitModel:
        if name not in models:
            directory = tmp_path_factory.mktemp("split") / "checkpoint"
            models[name] = SplitModel(directory, {**CONFIGS, **VARIANTS}[name])
        return models[name]

    return make
