"""Renders a batch script for Slurm: an array with a job for each replica, whose ranks srun starts in containers."""

from __future__ import annotations

import shlex
import string

from nvlm_trt.deployment.deployment import ENGINE_FOLDER, GRPC_PORT, Deployment

BATCH_SCRIPT = "serve.sbatch"
_PORT_STEP = 10  # between the ports of two replicas, which may share a node
_CPUS = 4  # of a rank
_GIB = 1 << 30

_TEMPLATE = string.Template("""\
#!/usr/bin/env bash
# Serves $model. Containers are run by pyxis (https://github.com/NVIDIA/pyxis), ranks find each other through PMIx.
#   sbatch $script
#   scancel --signal=TERM JOB    finishes the open requests, then ends; without --signal it has KillWait seconds only
#SBATCH --job-name=$name
#SBATCH --array=0-$last
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$ranks
$gpus#SBATCH --cpus-per-task=$cpus
#SBATCH --mem=${memory}G
#SBATCH --signal=TERM@$stop
#SBATCH --output=%x-%A-%a.log
set -euo pipefail

# where every node finds the image $image: a file that `enroot import` made, or a name in a registry
image=$${NVLM_TRT_IMAGE:?set NVLM_TRT_IMAGE to the image of the server}
engine=$${NVLM_TRT_ENGINE:-$engine}
export port=$$(($port + $step * SLURM_ARRAY_TASK_ID))
echo "$name $$SLURM_ARRAY_TASK_ID: grpc://$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1):$$port"

exec srun --mpi=pmix --kill-on-bad-exit=1 --container-image="$$image" --container-mounts="$$engine:$folder:ro" \\
  bash -c $ranks_command
""")


def batch_script(deployment: Deployment) -> str:
    """Render the script."""
    engine, layout = deployment.engine, deployment.layout
    # the shell of each rank computes the ports
    ports = '--http-port "$((port - 1))" --grpc-port "$port" --metrics-port "$((port + 1))"'
    serve = f"exec nvlm-trt serve {ENGINE_FOLDER} --host 0.0.0.0 {ports}"
    gpus = f"#SBATCH --gpus-per-node={deployment.gpus_per_node}\n" if engine.on_gpu else ""
    return _TEMPLATE.substitute(
        script=BATCH_SCRIPT,
        model=engine.model,
        name=deployment.name,
        last=layout.replicas - 1,
        nodes=layout.nodes,
        ranks=layout.ranks_per_node,
        gpus=gpus,
        cpus=_CPUS,
        memory=engine.host_memory // _GIB,
        stop=deployment.stop_seconds,
        image=deployment.image,
        engine=shlex.quote(str(engine.path)),
        port=GRPC_PORT,
        step=_PORT_STEP,
        folder=ENGINE_FOLDER,
        ranks_command=shlex.quote(deployment.rank_script(serve) if engine.ranks > 1 else serve),
    )
