"""Renders the Dockerfile of the server's image: the engine's container, and nvlm-trt in it."""

from __future__ import annotations

from nvlm_trt.deployment.deployment import USER, Deployment
from nvlm_trt.deployment.launch_script import LAUNCH_SCRIPT


def dockerfile(deployment: Deployment, launches: bool) -> str:
    """Render the Dockerfile. Its context is the folder that it is in, with the wheel of nvlm-trt beside it. `launches`:
    whether a container starts several ranks."""
    needs = deployment.engine.needs
    wheel = f"nvlm_trt-{deployment.version}-py3-none-any.whl"
    extras = f"[{','.join(needs.extras)}]" if needs.extras else ""
    index = f" --extra-index-url {needs.index}" if needs.index else ""
    packages = "".join(f" '{package}'" for package in needs.packages)
    lines = [
        f"# Makes the image of the server of {deployment.engine.model}: pip wheel --no-deps --wheel-dir . CHECKOUT",
        f"# puts nvlm-trt here, then: docker build --tag {deployment.image} .",
        f"FROM {needs.container}",
        f"COPY {wheel} /tmp/",
        f"RUN pip install --no-cache-dir{index} '/tmp/{wheel}{extras}'{packages} && rm /tmp/{wheel}",
    ]
    if deployment.layout.nodes > 1 and launches:
        lines += [
            "# mpirun starts the ranks of other pods over ssh",
            "RUN apt-get update && apt-get install -y --no-install-recommends openssh-server openssh-client \\",
            " && rm -rf /var/lib/apt/lists/*",
        ]
    if launches:
        lines.append(f"COPY --chmod=755 {LAUNCH_SCRIPT} /usr/local/bin/{LAUNCH_SCRIPT}")
    lines += [
        "# nothing runs as root; ssh takes a user with a name and a shell",
        f"RUN getent passwd {USER} >/dev/null || useradd --uid {USER} --user-group --shell /bin/bash server",
        f"USER {USER}",
    ]
    return "\n".join(lines) + "\n"
