"""The greatest numbers that limits, options and sampling parameters may have. Imports nothing: `--help` needs them."""

from __future__ import annotations

MAX_TILES = 64  # tests/image/test_tiling.py checks the tiling rule up to here; NVLM-1.0 has 6
MAX_SLOTS = 1 << 16
MAX_TOKENS = 1 << 26  # of a sequence
MAX_COUNT = (1 << 31) - 1  # of a sampling parameter
MAX_PRIORITY = (1 << 31) - 1  # and the least is its negative
MAX_SEED = (1 << 64) - 1
