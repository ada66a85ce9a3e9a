"""Tests presets: their names, and the error for an unknown name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nvlm_trt.errors import ConfigError
from nvlm_trt.model.preset_names import PRESET_NAMES
from nvlm_trt.model.presets import PRESETS, find_preset


def test_names_say_architecture_and_size() -> None:
    assert tuple(PRESETS) == PRESET_NAMES
    assert len(set(PRESET_NAMES)) == 12
    for name, config in PRESETS.items():
        assert config.name == name
        assert name.startswith(f"nvlm-{config.architecture.lower()}-")
        assert find_preset(name) is config


def test_sizes_of_one_name_share_vision_encoder_and_llm() -> None:
    sizes = {name.rsplit("-", 1)[1] for name in PRESETS}
    for size in sizes:
        d, x, h = (PRESETS[f"nvlm-{letter}-{size}"] for letter in "dxh")
        assert (d.vision, d.llm) == (x.vision, x.llm) == (h.vision, h.llm)
    assert len({PRESETS[f"nvlm-d-{size}"].llm for size in sizes}) == len(sizes)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'nvlm-d-7b' is not one of nvlm-d-tiny, .*nvlm-h-72b"):
        find_preset("nvlm-d-7b")


def test_the_command_line_names_presets_without_their_sizes() -> None:
    """The sizes need pydantic, whose import takes about 0.1 s: --help must not import it."""
    code = "import sys, nvlm_trt.cli; assert not {'pydantic', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
