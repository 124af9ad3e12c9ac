"""The Kubernetes manifests, offline: their parts fit each other and the server they start."""

import dataclasses
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jax_engine import EngineConfig
from jax_engine.testing.fake_engine import FakeAsyncEngine
from serving import flags
from serving.app import create_app
from serving.commands import common
from serving.keys import PUBLIC_PATHS
from serving.options import ServerOptions

FOLDER = Path(__file__).resolve().parent.parent / "deploy/kubernetes"
#: The fields of LeaderWorkerSet v1 (its own schema comes with its controller only), as far as a manifest may want them;
#: pods stand for core templates, which Kubernetes' schemas check.
LEADER_WORKER_SET = {
    "type": "object",
    "required": ["leaderWorkerTemplate"],
    "additionalProperties": False,
    "properties": {
        "replicas": {"type": "integer", "minimum": 0},
        "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
        "networkConfig": {"type": "object"},
        "rolloutStrategy": {
            "type": "object",
            "required": ["type"],
            "additionalProperties": False,
            "properties": {
                "type": {"enum": ["RollingUpdate"]},
                "rollingUpdateConfiguration": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        name: {"type": ["integer", "string"]} for name in ("partition", "maxUnavailable", "maxSurge")
                    },
                },
            },
        },
        "leaderWorkerTemplate": {
            "type": "object",
            "required": ["workerTemplate"],
            "additionalProperties": False,
            "properties": {
                "size": {"type": "integer", "minimum": 1},
                "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
                "leaderTemplate": {"type": "object"},
                "workerTemplate": {"type": "object"},
                "subGroupPolicy": {"type": "object"},
            },
        },
    },
}
#: What LeaderWorkerSet puts into the environment of each pod of a group.
LEADER = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0", "LWS_LEADER_ADDRESS": "jax-engine-large-0.jax-engine-large.x"}


def documents(name):
    """kind -> document"""
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / name).read_text())}


@pytest.fixture(scope="module")
def parts():
    return {kind: document["spec"] for kind, document in documents("deployment.yaml").items()}


@pytest.fixture(scope="module")
def groups():
    return {kind: document["spec"] for kind, document in documents("leaderworkerset.yaml").items()}


@pytest.fixture(params=["Deployment", "leaderTemplate", "workerTemplate"])
def pod(request, parts, groups):
    """The pod templates of both manifests."""
    if request.param == "Deployment":
        return parts["Deployment"]["template"]
    return groups["LeaderWorkerSet"]["leaderWorkerTemplate"][request.param]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_the_schemas_of_kubernetes_accept_every_document(name):
    version = kubernetes_validate.latest_version()
    for kind, document in documents(name).items():
        if kind != "LeaderWorkerSet":
            kubernetes_validate.validate(document, version, strict=True)
            continue
        assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1" and document["metadata"]["name"]
        jsonschema.validate(document["spec"], LEADER_WORKER_SET)
        for template in ("leaderTemplate", "workerTemplate"):
            pods = {"template": document["spec"]["leaderWorkerTemplate"][template], "metadata": {"name": "x"}}
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "PodTemplate", **pods}, version, strict=True)


def container(pod):
    (only,) = pod["spec"]["containers"]
    return only


def options_of(pod, environment):
    """The server's and the engine's configuration of a pod whose containers have that environment."""
    words = [re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], word) for word in container(pod)["args"]]
    assert words[0] == "serve"
    flag_values = common.engine_flags(log_level="info")
    flags.define(flag_values, ServerOptions, group="Server")
    assert flags.parse(flag_values, "serve", words[1:]) == []
    options = ServerOptions(**flags.values(flag_values, ServerOptions))
    return options, EngineConfig(**flags.values(flag_values, EngineConfig))


def test_the_arguments_are_flags_of_serve(pod):
    options, _ = options_of(pod, LEADER)
    assert pod["spec"]["terminationGracePeriodSeconds"] > options.drain_timeout_s + 5
    assert options.api_key_file is not None, "a server that listens to all must ask for keys"
    if "ports" in container(pod):
        assert container(pod)["ports"][0] == {"name": "http", "containerPort": options.port}


def test_a_group_is_one_engine(groups):
    spec = groups["LeaderWorkerSet"]["leaderWorkerTemplate"]
    leader, worker = spec["leaderTemplate"], spec["workerTemplate"]
    (_, first), (_, second) = options_of(leader, LEADER), options_of(worker, LEADER | {"LWS_WORKER_INDEX": "1"})
    assert second == dataclasses.replace(first, process_id=1) and first.num_processes == spec["size"]
    gpus = int(container(leader)["resources"]["limits"]["nvidia.com/gpu"])
    assert first.tensor_parallel_size == gpus * spec["size"] and container(worker)["resources"]["limits"]
    port = int(first.coordinator_address.rpartition(":")[2])
    assert {p["containerPort"] for p in container(leader)["ports"]} == {8000, port, port + 1}
    options, _ = options_of(leader, LEADER)
    waits = container(worker)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert options.drain_timeout_s < waits < worker["spec"]["terminationGracePeriodSeconds"]


def test_nobody_reaches_the_ports_of_a_group(groups):
    policy, labels = groups["NetworkPolicy"], {"app": "jax-engine-large"}
    for template in ("leaderTemplate", "workerTemplate"):
        pod_labels = groups["LeaderWorkerSet"]["leaderWorkerTemplate"][template]["metadata"]["labels"]
        assert labels.items() <= pod_labels.items()
    assert policy["podSelector"]["matchLabels"] == labels
    for_all, for_the_group = policy["ingress"]
    assert for_all == {"ports": [{"port": 8000}]}
    assert for_the_group["from"] == [{"podSelector": {"matchLabels": labels}}]


def test_probes_ask_addresses_that_answer_without_a_key(pod):
    addresses = {route.resource.canonical for route in create_app(FakeAsyncEngine()).router.routes() if route.resource}
    probes = {name: value["httpGet"] for name, value in container(pod).items() if name.endswith("Probe")}
    if pod["metadata"]["labels"].get("role") == "worker":
        assert not probes, "a worker serves nothing"
        return
    ports = {port["name"] for port in container(pod)["ports"]}
    assert set(probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
    for probe in probes.values():
        assert probe["path"] in addresses & PUBLIC_PATHS and probe["port"] in ports
    assert probes["livenessProbe"]["path"] == "/version", "/health is 503 while draining"


def test_selectors_volumes_and_ports_fit(pod, parts, groups):
    assert {v["name"] for v in pod["spec"]["volumes"]} == {m["name"] for m in container(pod)["volumeMounts"]}
    labels = parts["Deployment"]["template"]["metadata"]["labels"]
    assert parts["Deployment"]["selector"]["matchLabels"] == labels == parts["Service"]["selector"]
    assert parts["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    leader = groups["LeaderWorkerSet"]["leaderWorkerTemplate"]["leaderTemplate"]
    assert groups["Service"]["selector"] == leader["metadata"]["labels"]
    for spec, template in ((parts, parts["Deployment"]["template"]), (groups, leader)):
        assert spec["Service"]["ports"][0]["targetPort"] in {port["name"] for port in container(template)["ports"]}


def test_the_pod_is_locked_down(pod):
    security = container(pod)["securityContext"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False and security["capabilities"]["drop"] == ["ALL"]
