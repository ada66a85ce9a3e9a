"""The names of the presets without their sizes: enough for the CLI's help, which need not wait for pydantic."""

from __future__ import annotations

PRESET_NAMES = tuple(f"nvlm-{letter}-{size}" for size in ("tiny", "small", "34b", "72b") for letter in "dxh")
