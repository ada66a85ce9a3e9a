"""Implements `nvlm-trt deploy`: writes what compose, Kubernetes or Slurm needs in order to serve an engine."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated

import typer

from nvlm_trt import terminal
from nvlm_trt.errors import NvlmError
from nvlm_trt.extras import require

_TARGETS = ("compose", "kubernetes", "slurm")
_MOST = 1024
_NEXT = {
    "compose": "docker compose --file {output}/compose.yaml up --build --wait",
    "kubernetes": "kubectl apply --kustomize {output} (docs/deploy.md)",
    "slurm": "NVLM_TRT_IMAGE=... sbatch {output}/serve.sbatch",
}


def deploy(
    engine: Annotated[Path, typer.Argument(help="Engine directory that `nvlm-trt build` made.")],
    target: Annotated[str, typer.Option(help=f"{', '.join(_TARGETS[:-1])} or {_TARGETS[-1]}.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write [deploy-TARGET].")] = None,
    replicas: Annotated[int, typer.Option(min=1, max=_MOST, help="Servers, each with a copy of the engine.")] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST, help="Most servers of the autoscaler (kubernetes) [twice --replicas]."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Machines of one server [as few as hold its GPUs].")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=_MOST, help="GPUs of a machine.")] = 8,
    name: Annotated[str | None, typer.Option(help="Name of what is deployed [the model's].")] = None,
    image: Annotated[str | None, typer.Option(help="Image of the server [NAME-server:VERSION].")] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Where the autoscaler reads metrics (kubernetes) [a service in `monitoring`].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder of that name.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the files as one JSON object, and write none.")
    ] = False,
) -> None:
    """Write the files that deploy an engine: a compose file, Kubernetes manifests or a Slurm script, and a Dockerfile.

    Example: nvlm-trt deploy engines/nvlm-h --target kubernetes --replicas 2 --output deploy-nvlm-h
    """
    if target not in _TARGETS:
        raise NvlmError(f"--target {target!r} is not one of {', '.join(_TARGETS)}; choose one")
    require("deploy", "deploying an engine")
    from nvlm_trt.deployment.deployed_engine import DeployedEngine
    from nvlm_trt.deployment.deployment import Deployment
    from nvlm_trt.deployment.files import render, write
    from nvlm_trt.deployment.options import DeployOptions
    from nvlm_trt.engine import Engine

    options = DeployOptions(
        replicas,
        max_replicas,
        nodes,
        gpus_per_node,
        name,
        image,
        **({} if prometheus is None else {"prometheus": prometheus}),
    )
    described = DeployedEngine.of(Engine.open(engine))
    deployment = Deployment.of(described, options, importlib.metadata.version("nvlm-trt"))
    files = render(deployment, target)
    if as_json:
        print(json.dumps(files, indent=2, allow_nan=False))
        return
    output = output or Path(f"deploy-{target}")
    write(files, output, overwrite)
    terminal.note(f"wrote {output}: {', '.join(files)}")
    layout = deployment.layout
    if described.needs.tp > layout.ranks_per_node:
        terminal.note(f"tp {described.needs.tp} crosses nodes: each layer waits for the network; take fewer --nodes")
    if target == "kubernetes" and layout.nodes > 1:
        terminal.note(
            f"the pods need a key pair: ssh-keygen -t ed25519 -N '' -f id_ed25519; kubectl create secret generic "
            f"{deployment.name}-ssh --from-file=id_ed25519 --from-file=id_ed25519.pub"
        )
    started = _NEXT[target].format(output=output)
    terminal.note(f"next, once {deployment.image} is built from {output}/Dockerfile: {started}")
