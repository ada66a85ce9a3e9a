"""Renders the script that starts the ranks of an engine with mpirun, in one container or in the pods of one group."""

from __future__ import annotations

import shlex
import string

from nvlm_trt.deployment.deployment import Deployment

LAUNCH_SCRIPT = "launch-ranks"
SSH_PORT = 2222
KEY_FOLDER = "/etc/nvlm-ssh"  # the secret with id_ed25519 and id_ed25519.pub

_HEAD = """\
#!/usr/bin/env bash
# Starts $ranks ranks$where.
# SIGTERM goes to rank 0 alone, which finishes the open requests and ends the others; mpirun itself would kill them all.
set -euo pipefail
"""
_KEYS = """
# One key pair, from a secret, is the host key and the user's key of all pods.
install -d -m 700 /tmp/ssh
install -m 600 $keys/id_ed25519 $keys/id_ed25519.pub /tmp/ssh
cp /tmp/ssh/id_ed25519.pub /tmp/ssh/authorized_keys
echo "* $$(cat /tmp/ssh/id_ed25519.pub)" >/tmp/ssh/known_hosts

if [ "$$LWS_WORKER_INDEX" != 0 ]; then
  exec /usr/sbin/sshd -D -e -p $port -h /tmp/ssh/id_ed25519 -o AuthorizedKeysFile=/tmp/ssh/authorized_keys \\
    -o PidFile=none -o UsePAM=no -o StrictModes=no -o PasswordAuthentication=no \\
    -o "SetEnv=PATH=$$PATH LD_LIBRARY_PATH=$${LD_LIBRARY_PATH:-} HOME=$$HOME"
fi

ssh_options="-p $port -i /tmp/ssh/id_ed25519 -o UserKnownHostsFile=/tmp/ssh/known_hosts -o BatchMode=yes"
# for Open MPI 4, and for 5, which would cut the names of pods at their first dot
export OMPI_MCA_plm_rsh_args=$$ssh_options OMPI_MCA_orte_keep_fqdn_hostnames=1
export PRTE_MCA_plm_ssh_args=$$ssh_options PRTE_MCA_prte_keep_fqdn_hostnames=1
hosts=localhost:$per_node
for ((index = 1; index < LWS_GROUP_SIZE; index++)); do
  worker=$${LWS_LEADER_ADDRESS%%.*}-$$index.$${LWS_LEADER_ADDRESS#*.}
  # shellcheck disable=SC2086
  until ssh $$ssh_options -o ConnectTimeout=5 "$$worker" true; do sleep 1; done
  hosts+=,$$worker:$per_node
done
"""
_RUN = """
export rank_0=$${TMPDIR:-/tmp}/rank-0.pid
rm -f "$$rank_0"
stop() {
  kill -TERM "$$(cat "$$rank_0" 2>/dev/null || echo "$$launch")"
}
# ranks are bound to no core: rank 0 has tritonserver's threads
mpirun --bind-to none $hosts-n $ranks \\
  bash -c $rank_script &
launch=$$!
trap stop TERM INT
status=0
while kill -0 "$$launch" 2>/dev/null; do
  status=0
  wait "$$launch" || status=$$?
done
exit "$$status"
"""


def container_command(deployment: Deployment) -> list[str]:
    """Return the command of a container: the server's, or this script's where there are several ranks."""
    return [LAUNCH_SCRIPT] if deployment.engine.ranks > 1 else deployment.serve_command()


def launch_script(deployment: Deployment) -> str:
    """Render the script."""
    several = deployment.layout.nodes > 1
    serve = f'echo $$ >"$rank_0"; exec {shlex.join(deployment.serve_command())}'
    return string.Template(_HEAD + (_KEYS if several else "") + _RUN).substitute(
        where=" in the pods of a LeaderWorkerSet" if several else "",
        keys=KEY_FOLDER,
        port=SSH_PORT,
        ranks=deployment.engine.ranks,
        per_node=deployment.layout.ranks_per_node,
        hosts='--host "$hosts" ' if several else "",
        rank_script=shlex.quote(deployment.rank_script(serve)),
    )
