"""Estimates how long a calibration takes: the FLOPs of its samples over the rate at which this machine multiplies."""

from __future__ import annotations

import time

import numpy as np

from nvlm_trt.backends.table import DEFAULT_BACKEND, find_backend
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.precision import COMPONENTS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.roofline import Roofline

_ROWS, _WIDTH = 512, 2048  # of the product whose time is measured: 2 * 512 * 2048 ** 2 = 4.3 GFLOP
_SECONDS = 0.3


def calibration_seconds(
    config: NvlmConfig,
    samples: int,
    tokens_per_sample: int,
    tiles_per_sample: int,
    flops_per_second: float,
    tag_length: int = 0,
) -> float:
    """Estimate the seconds that `samples` samples take on the CPU, by layer or with the whole model.

    `tokens_per_sample`: tokens of text, answer included; `tiles_per_sample`: tiles, thumbnail included (0: no image);
    `flops_per_second`: see `measured_flop_rate`; `tag_length`: tokens of an NVLM-H tile tag. Reading weights and
    counting magnitudes are not included: in a large model, both are small beside the products."""
    fp32 = dict.fromkeys(COMPONENTS, "fp32")
    design = EngineDesign(config, EngineLimits(), fp32, find_backend(DEFAULT_BACKEND), tag_length)
    flops = sum(work.flops for work in Roofline(design).prefill(tokens_per_sample, tiles_per_sample).values())
    return samples * flops / flops_per_second


def measured_flop_rate() -> float:
    """Measure the float32 operations per second of a product on all cores, two per multiply-add. Takes about 0.3 s."""
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal((rows, _WIDTH), dtype=np.float32) for rows in (_ROWS, _WIDTH))
    np.matmul(x, weight)  # starts the threads
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < _SECONDS:
        np.matmul(x, weight)
        products += 1
    return 2 * products * x.size * _WIDTH / (time.perf_counter() - started)
