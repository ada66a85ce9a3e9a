"""Renders the script that starts an engine on several pods: workers wait for ssh, the leader runs mpirun."""

from __future__ import annotations

import shlex
import string

from nvlm_trt.deployment.deployment import Deployment

LAUNCH_SCRIPT = "launch-ranks"
SSH_PORT = 2222
KEY_FOLDER = "/etc/nvlm-ssh"  # the secret with id_ed25519 and id_ed25519.pub

_TEMPLATE = string.Template("""\
#!/usr/bin/env bash
# Runs in every pod of a LeaderWorkerSet, which sets LWS_LEADER_ADDRESS, LWS_GROUP_SIZE and LWS_WORKER_INDEX.
# One key pair, from a secret, is the host key and the user's key of all pods.
set -euo pipefail

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
hosts=localhost:$ranks
for ((index = 1; index < LWS_GROUP_SIZE; index++)); do
  worker=$${LWS_LEADER_ADDRESS%%.*}-$$index.$${LWS_LEADER_ADDRESS#*.}
  # shellcheck disable=SC2086
  until ssh $$ssh_options -o ConnectTimeout=5 "$$worker" true; do sleep 1; done
  hosts+=,$$worker:$ranks
done
exec $mpirun -n $$((LWS_GROUP_SIZE * $ranks)) --host "$$hosts" --mca plm_rsh_args "$$ssh_options" \\
  bash -c $script
""")


def launch_script(deployment: Deployment) -> str:
    """Render the script."""
    return _TEMPLATE.substitute(
        keys=KEY_FOLDER,
        port=SSH_PORT,
        ranks=deployment.layout.ranks_per_node,
        mpirun=shlex.join(deployment.mpirun),
        script=shlex.quote(deployment.rank_script(shlex.join(deployment.serve_command()))),
    )
