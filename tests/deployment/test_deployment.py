"""Tests what deployments promise: GPUs, memory, times and ports follow from the engine, for every layout."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment_engines import CONTAINER, llm_record, write_engine
from hypothesis import assume, given
from hypothesis import strategies as st

from nvlm_trt.backends.spec import ServerNeeds
from nvlm_trt.deployment.compose import compose_file
from nvlm_trt.deployment.deployed_engine import DeployedEngine
from nvlm_trt.deployment.deployment import Deployment
from nvlm_trt.deployment.dockerfile import dockerfile
from nvlm_trt.deployment.files import TARGETS, render
from nvlm_trt.deployment.kubernetes.manifests import manifests
from nvlm_trt.deployment.layout import Layout
from nvlm_trt.deployment.options import DeployOptions
from nvlm_trt.deployment.slurm import batch_script
from nvlm_trt.deployment.yaml_file import to_yaml
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.image.image_limits import ImageLimits
from nvlm_trt.serving.triton.models.metrics import _DESCRIPTIONS as METRICS
from nvlm_trt.serving.triton.repository import placement_of
from nvlm_trt.serving.triton.server import ServerOptions
from nvlm_trt.serving.triton.shared_memory import SharedMemory
from nvlm_trt.serving.triton.stopping import EXIT_SECONDS

GIB = 1 << 30


def engine_of(tp: int, pp: int, on_gpu: bool = True, **changes: Any) -> DeployedEngine:
    worker = "nvlm_trt.backends.tensorrt_llm.worker" if tp * pp > 1 else None
    fields: dict[str, Any] = {
        "name": "nvlm-d-72b",
        "model": "nvlm-d-72b",
        "backend": "tensorrt-llm",
        "fingerprint": "0" * 64,
        "path": Path("/srv/engines/nvlm-d-72b"),
        "nbytes": 160 * 10**9,
        "needs": ServerNeeds(CONTAINER, tp=tp, pp=pp, worker=worker),
        "on_gpu": on_gpu,
        "slots": 8,
        "shared_memory": 6 * GIB,
        "host_memory": 10 * GIB,
    }
    return DeployedEngine(**fields | changes)


def deployment_of(engine: DeployedEngine, **options: Any) -> Deployment:
    return Deployment.of(engine, DeployOptions(**options), "0.1.0")


def templates(workload: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Returns (number of pods of a replica, template) of each template of a workload."""
    spec = workload["spec"]
    if workload["kind"] == "Deployment":
        return [(1, spec["template"])]
    group = spec["leaderWorkerTemplate"]
    return [(1, group["leaderTemplate"]), (group["size"] - 1, group["workerTemplate"])]


layouts = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 5]), st.integers(1, 4), st.integers(1, 16))


@given(layouts, st.none() | st.integers(1, 16))
def test_every_target_asks_for_one_gpu_per_rank(shape: tuple[int, int, int, int], nodes: int | None) -> None:
    tp, pp, replicas, gpus_per_node = shape
    options = {"replicas": replicas, "nodes": nodes, "gpus_per_node": gpus_per_node}
    if nodes is not None and ((tp * pp) % nodes or tp * pp // nodes > gpus_per_node):
        with pytest.raises(EngineError, match="--nodes|--replicas"):
            deployment_of(engine_of(tp, pp), **options)
        return
    deployment = deployment_of(engine_of(tp, pp), **options)
    world = tp * pp
    workload = manifests(deployment)["workload.yaml"]
    assert (workload["kind"] == "Deployment") == (deployment.layout.nodes == 1)
    gpus = [
        pods * int(template["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for pods, template in templates(workload)
    ]
    assert sum(gpus) == world
    assert workload["spec"]["replicas"] == replicas

    script = batch_script(deployment)
    nodes_, tasks, cards = (
        int(re.search(rf"#SBATCH --{name}=(\d+)", script)[1])  # type: ignore[index]
        for name in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert nodes_ * tasks == nodes_ * cards == world
    assert f"--array=0-{replicas - 1}\n" in script

    if deployment.layout.nodes == 1 and world * replicas <= gpus_per_node:
        services = compose_file(deployment)["services"].values()
        devices = [service["deploy"]["resources"]["reservations"]["devices"][0] for service in services]
        ids = [number for device in devices for number in device["device_ids"]]
        assert sorted(map(int, ids)) == list(range(world * replicas))  # none twice
        ports = [port for service in services for port in service["ports"]]
        assert len(set(ports)) == 3 * replicas
        assert all(port.startswith("127.0.0.1:") for port in ports)
    else:
        with pytest.raises(EngineError, match="one machine|take"):
            compose_file(deployment)


def test_the_fewest_nodes_are_taken() -> None:
    assert Layout.of(engine_of(8, 2), 1, None, 8) == Layout(1, 2, 8)
    assert Layout.of(engine_of(4, 2), 1, None, 8) == Layout(1, 1, 8)
    assert Layout.of(engine_of(2, 3), 1, None, 4) == Layout(1, 2, 3)
    with pytest.raises(EngineError, match=r"8 ranks \(tp 4 x pp 2\), which 3 nodes of 8 GPUs .* --nodes 1, 2, 4 or 8$"):
        Layout.of(engine_of(4, 2), 1, 3, 8)
    with pytest.raises(EngineError, match=r"1 nodes of 4 GPUs .* --nodes 2, 4 or 8$"):
        Layout.of(engine_of(4, 2), 1, 1, 4)
    with pytest.raises(EngineError, match="runs on one node, not on 2; --replicas"):
        Layout.of(engine_of(1, 1), 1, 2, 8)


@given(shape=layouts, drain=st.floats(1, 1000))
def test_a_server_may_drain_before_it_is_killed(shape: tuple[int, int, int, int], drain: float) -> None:
    tp, pp, _, gpus_per_node = shape
    assume(tp * pp <= gpus_per_node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nvlm_trt.deployment.deployment.ServerOptions", lambda: ServerOptions(drain_seconds=drain))
        deployment = deployment_of(engine_of(tp, pp), gpus_per_node=gpus_per_node)
        ((_, template),) = templates(manifests(deployment)["workload.yaml"])
        (service,) = compose_file(deployment)["services"].values()
        signal = re.search(r"--signal=TERM@(\d+)", batch_script(deployment))
    (container,) = template["spec"]["containers"]
    leave = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert template["spec"]["terminationGracePeriodSeconds"] >= leave + drain + EXIT_SECONDS
    assert int(service["stop_grace_period"].rstrip("s")) >= drain + EXIT_SECONDS
    assert signal is not None
    assert int(signal[1]) >= drain + EXIT_SECONDS


def test_a_start_may_take_as_long_as_reading_the_engine_and_loading_it() -> None:
    ((_, template),) = templates(manifests(deployment_of(engine_of(1, 1)))["workload.yaml"])
    probes = {name: template["spec"]["containers"][0][f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 160 / 0.2 + 600
    # Triton calls the server ready before nvlm is, and after nvlm has died
    assert probes["readiness"]["httpGet"]["path"] == probes["startup"]["httpGet"]["path"] == "/v2/models/nvlm/ready"


@pytest.mark.parametrize("tp", [1, 2])
def test_shared_memory_holds_all_regions(tmp_path: Path, tp: int) -> None:
    opened = Engine.open(write_engine(tmp_path / "e", "nvlm-x-72b", "tensorrt-llm", "bf16", llm_record(tp, 1)))
    engine = DeployedEngine.of(opened)
    memory = SharedMemory(opened, placement_of(opened), ImageLimits())
    assert engine.shared_memory >= 4 * memory.most_per_model + (GIB if tp > 1 else 0)
    assert engine.shared_memory >= memory.largest_request_needs
    deployment = deployment_of(engine)
    ((_, template),) = templates(manifests(deployment)["workload.yaml"])
    volume = next(volume for volume in template["spec"]["volumes"] if volume["name"] == "shared-memory")
    assert int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * GIB == engine.shared_memory
    requests = template["spec"]["containers"][0]["resources"]["requests"]
    assert int(requests["memory"].removesuffix("Gi")) * GIB >= engine.shared_memory  # which counts as the pod's memory
    (service,) = compose_file(deployment)["services"].values()
    assert int(service["shm_size"].removesuffix("m")) << 20 == engine.shared_memory


def test_queries_are_of_metrics_that_the_server_has() -> None:
    from nvlm_trt.serving.triton.models import histograms

    known = {*METRICS, *(f"{value.name}_bucket" for value in vars(histograms).values() if hasattr(value, "buckets"))}
    triggers = manifests(deployment_of(engine_of(1, 1)))["scaled-object.yaml"]["spec"]["triggers"]
    used = {name for trigger in triggers for name in re.findall(r"\bnvlm_\w+", trigger["metadata"]["query"])}
    assert used == {"nvlm_request_queue_time_seconds_bucket", "nvlm_queued_requests"}
    assert used <= known


def test_policies_let_in_clients_and_monitoring_alone() -> None:
    one, several = (
        manifests(deployment_of(engine_of(4, 2), nodes=nodes))["network-policy.yaml"]["spec"] for nodes in (1, 2)
    )
    assert one["policyTypes"] == ["Ingress", "Egress"]
    assert one["egress"] == []
    assert [[port["port"] for port in rule["ports"]] for rule in one["ingress"]] == [[8000, 8001], [8002]]
    assert several["ingress"][:2] == one["ingress"]
    selectors = [rule["from"] for rule in several["ingress"][2:]]
    assert selectors == [[{"podSelector": several["podSelector"]}]]


def test_the_service_reaches_leaders_alone() -> None:
    files = manifests(deployment_of(engine_of(4, 2), nodes=2))
    selector = files["service.yaml"]["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    (_, leader), (_, worker) = templates(files["workload.yaml"])
    ports = {port["name"] for port in leader["spec"]["containers"][0]["ports"]}
    assert ports == {port["targetPort"] for port in files["service.yaml"]["spec"]["ports"]}
    assert leader["metadata"]["labels"] == worker["metadata"]["labels"]
    assert "annotations" not in worker["metadata"]  # no metrics there
    target = files["scaled-object.yaml"]["spec"]["scaleTargetRef"]
    assert target["kind"] == files["workload.yaml"]["kind"] == "LeaderWorkerSet"


def test_an_engine_for_one_compute_capability_goes_to_such_nodes() -> None:
    engine = engine_of(1, 1, needs=ServerNeeds("nvcr.io/nvidia/tritonserver:26.07-py3", capability=121))
    ((_, template),) = templates(manifests(deployment_of(engine))["workload.yaml"])
    labels = {"nvidia.com/gpu.compute.major": "12", "nvidia.com/gpu.compute.minor": "1"}
    assert template["spec"]["nodeSelector"] == labels


def test_an_engine_on_a_cpu_asks_for_no_gpu() -> None:
    deployment = deployment_of(engine_of(1, 1, on_gpu=False, needs=ServerNeeds()))
    for target in TARGETS:
        for name, content in render(deployment, target).items():
            assert "gpu" not in content.replace("gpus_per_node", ""), name
    assert "FROM python:3.12-slim\n" in dockerfile(deployment, launches=False)


def test_images_have_what_a_backend_needs() -> None:
    needs = ServerNeeds("base:1", ("tensorrt", "structured"), ("tensorrt==11.1.0.106",), "https://pypi.nvidia.com")
    text = dockerfile(deployment_of(engine_of(1, 1, needs=needs)), launches=False)
    assert (
        "RUN pip install --no-cache-dir --extra-index-url https://pypi.nvidia.com "
        "'/tmp/nvlm_trt-0.1.0-py3-none-any.whl[tensorrt,structured]' 'tensorrt==11.1.0.106' && rm" in text
    )
    assert "openssh" not in text
    assert "openssh" not in dockerfile(deployment_of(engine_of(4, 1)), launches=True)
    assert "openssh-server" in dockerfile(deployment_of(engine_of(4, 1), nodes=2), launches=True)


def test_paths_with_a_dollar_sign() -> None:
    engine = engine_of(1, 1, path=Path("/srv/$HOME engines/d"))
    (service,) = compose_file(deployment_of(engine))["services"].values()
    assert service["volumes"][0]["source"] == "/srv/$$HOME engines/d"
    line = next(line for line in batch_script(deployment_of(engine)).splitlines() if line.startswith("engine="))
    assert line == "engine=${NVLM_TRT_ENGINE:-'/srv/$HOME engines/d'}"


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=200) | st.sampled_from(
    ["yes", "no", "8001", "1e3", "0o17", "~", "null", "2026-01-01", "a: b", "- x", "#", "{", "'", '"', "a\nb", " "]
)


@given(st.dictionaries(texts, texts | st.integers() | st.booleans() | st.lists(texts)))
def test_yaml_is_read_as_it_was_given(document: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml({"top": document})) == {"top": document}
    assert list(yaml.safe_load(to_yaml({"top": document}))["top"]) == list(document)


@pytest.mark.parametrize(
    ("model", "name"), [("NVLM-D 72B!", "nvlm-d-72b"), ("72b", "nvlm-72b"), ("--", "nvlm"), ("x" * 80, "x" * 40)]
)
def test_names(tmp_path: Path, model: str, name: str) -> None:
    opened = Engine.open(write_engine(tmp_path / "e", "nvlm-h-tiny", "onnxruntime", "fp32", None))
    renamed = dataclasses.replace(opened, manifest=opened.manifest.model_copy(update={"model_name": model}))
    assert DeployedEngine.of(renamed).name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Nvlm"}, "--name 'Nvlm' is not a DNS label"),
        ({"name": "a" * 41}, "up to 40"),
        ({"name": "a-"}, "DNS label"),
        ({"image": "x y"}, "--image 'x y'"),
        ({"image": "x:1\nRUN"}, "--image"),
        ({"prometheus": "prometheus:9090"}, "http://HOST:PORT"),
        ({"prometheus": "http://a b"}, "http://HOST:PORT"),
        ({"replicas": 3, "max_replicas": 2}, "--max-replicas 2 is below --replicas 3"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        DeployOptions(**options)
    DeployOptions(name="a", image="nvcr.io:5000/a/b:1.2@sha256:" + "0" * 64, prometheus="https://p:1/x", max_replicas=1)


def test_ports_of_slurms_replicas_are_quoted_for_the_ranks() -> None:
    """The shell of the batch script expands nothing of the command, the shell of each rank does."""
    script = batch_script(deployment_of(engine_of(2, 1)))
    words = shlex.split(script[script.index("bash -c ") :])
    assert words[0:2] == ["bash", "-c"]
    assert '--grpc-port "$port"' in words[2]
    assert "trap '' TERM; exec python3 -m nvlm_trt.backends.tensorrt_llm.worker /engine" in words[2]
