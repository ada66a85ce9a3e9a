"""Reads the parameters that a rendered config.pbtxt gives to a python model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.image.decoding import ImageLimits


def read_parameters(args: Mapping[str, str]) -> dict[str, str]:
    """Read the parameters from `args`, the argument of `initialize`."""
    entries = json.loads(args["model_config"])["parameters"]
    return {name: entry["string_value"] for name, entry in entries.items()}


def open_engine(parameters: Mapping[str, str]) -> Engine:
    """Open the engine that the server was started for. Raises EngineError if its directory holds another by now.

    The path is one from the server's directory. The parameter `engine` is for people: its characters may be others than
    ASCII, which the interpreter of a model cannot use in paths."""
    engine = Engine.open(parameters.get("engine_link", parameters["engine"]))
    if parameters.get("engine_fingerprint", engine.fingerprint) != engine.fingerprint:
        raise EngineError(f"{parameters['engine']} was replaced while the server started; start the server again")
    return engine


def image_limits(parameters: Mapping[str, str]) -> ImageLimits:
    """Read the limits; one that is missing has its default."""
    limits: dict[str, Any] = {
        field.name: json.loads(parameters[field.name]) for field in fields(ImageLimits) if field.name in parameters
    }
    return ImageLimits(**limits)
