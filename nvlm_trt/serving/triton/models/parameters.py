"""Reads the parameters that a rendered config.pbtxt gives to a python model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nvlm_trt.image.decoding import ImageLimits


def read_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """Read the parameters from `args`, the argument of `initialize`."""
    entries = json.loads(args["model_config"])["parameters"]
    return {name: entry["string_value"] for name, entry in entries.items()}


def image_limits(parameters: Mapping[str, str]) -> ImageLimits:
    """Read the limits; one that is missing has its default."""
    limits: dict[str, Any] = {
        field.name: json.loads(parameters[field.name]) for field in fields(ImageLimits) if field.name in parameters
    }
    return ImageLimits(**limits)
