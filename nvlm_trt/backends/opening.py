"""Opens an engine, each stage with the backend that the manifest names."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from nvlm_trt.backends.base import STAGES, StepBackend, stages_of
from nvlm_trt.backends.layers import EngineLayers
from nvlm_trt.backends.spec import BackendSpec, OpenOptions
from nvlm_trt.backends.split import SplitBackend
from nvlm_trt.backends.table import backend_names, find_backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.layer_loop import LayerLoop


def backend_of(engine: Engine, stage: str = "decoder") -> BackendSpec:
    """Return the backend that opens a stage of an engine. Raises EngineError for an unknown backend or runtime."""
    own = _known(engine, engine.manifest.backend)
    name = engine.manifest.runtimes.get(stage, own.name)
    return own if name in own.stage_runtimes else _known(engine, name)


def _known(engine: Engine, name: str) -> BackendSpec:
    if name not in backend_names():
        raise EngineError(
            f"engine {engine.path} was built for the backend {name!r}, which this nvlm-trt does not have; rebuild it "
            "with `nvlm-trt build`"
        )
    return find_backend(name)


def runtimes_here(engine: Engine) -> dict[str, str]:
    """Say, by stage, which runtime runs an engine on this machine, with its version.

    Raises EngineError if a runtime is missing that nothing replaces."""
    return {stage: runtime_here(engine, stage) for stage in stages_of(engine.config)}


def runtime_here(engine: Engine, stage: str) -> str:
    """Say which runtime runs one stage of an engine on this machine; see `runtimes_here`."""
    spec = backend_of(engine, stage)
    return spec.runtime_here(engine, stage) if spec.runtime_here else spec.probe()


def open_backend(
    engine: Engine,
    stages: Collection[str] = STAGES,
    threads: int | None = None,
    device: str | None = None,
) -> StepBackend:
    """Load the named stages of an engine; methods that need other stages may not be called. Close it, or use `with`.

    `threads`: CPU threads per stage; None: all cores that this process may use. `device`: "cpu", "cuda" or "cuda:1";
    None: the device of the backend.
    Raises EngineError if a stage cannot be loaded, or if the backend or the device is not known."""
    unknown = set(stages) - set(STAGES)
    assert not unknown, f"stages are {STAGES}, not {unknown}"
    stages = [stage for stage in stages_of(engine.config) if stage in stages]
    images, text = set(stages) & {"vision_encoder"}, set(stages) - {"vision_encoder"}
    options = OpenOptions(threads, device)
    if images and text and backend_of(engine, "vision_encoder") != backend_of(engine):
        with contextlib.ExitStack() as stack:
            vision = stack.enter_context(_open(engine, images, OpenOptions(threads)))
            split = SplitBackend(vision, _open(engine, text, options))
            stack.pop_all()  # `split` closes both
            return split
    return _open(engine, stages, options)


def open_layers(engine: Engine, loop: LayerLoop, threads: int | None = None) -> EngineLayers:
    """Return what runs an engine on the CPU a layer at a time. Raises EngineError if its backend cannot."""
    spec = backend_of(engine)
    if spec.open_layers is None:
        raise EngineError(f"the backend {spec.name} of engine {engine.path} cannot run it a layer at a time")
    return spec.open_layers(engine, loop, OpenOptions(threads))


def check_device(engine: Engine, spec: BackendSpec, options: OpenOptions) -> None:
    """Raise EngineError for a device that is not the backend's."""
    if options.device and options.device.split(":")[0] != spec.device:
        raise EngineError(
            f"engine {engine.path} runs on the device {spec.device!r}, not on {options.device!r}; open it with "
            f"{spec.device!r}"
        )


def _open(engine: Engine, stages: Collection[str], options: OpenOptions) -> StepBackend:
    spec = backend_of(engine, next(iter(stages)))
    check_device(engine, spec, options)
    if spec.open is None:
        raise EngineError(f"the backend {spec.name} of engine {engine.path} batches by itself and runs no single steps")
    return spec.open(engine, stages, options)
