"""The Kubernetes manifests, offline: their parts fit each other and the server they start."""

from pathlib import Path

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


@pytest.fixture(scope="module")
def parts():
    documents = list(yaml.safe_load_all((FOLDER / "deployment.yaml").read_text()))
    assert all(document["apiVersion"] and document["metadata"]["name"] for document in documents)
    return {document["kind"]: document["spec"] for document in documents}


def test_the_schemas_of_kubernetes_accept_every_document():
    for document in yaml.safe_load_all((FOLDER / "deployment.yaml").read_text()):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def container(parts):
    (only,) = parts["Deployment"]["template"]["spec"]["containers"]
    return only


def test_the_arguments_are_flags_of_serve(parts):
    command, *words = container(parts)["args"]
    assert command == "serve"
    flag_values = common.engine_flags(log_level="info")
    flags.define(flag_values, ServerOptions, group="Server")
    assert flags.parse(flag_values, "serve", words) == []
    options = ServerOptions(**flags.values(flag_values, ServerOptions))
    EngineConfig(**flags.values(flag_values, EngineConfig))
    assert [port["containerPort"] for port in container(parts)["ports"]] == [options.port]
    assert parts["Deployment"]["template"]["spec"]["terminationGracePeriodSeconds"] > options.drain_timeout_s + 5
    assert options.api_key_file is not None, "a server that listens to all must ask for keys"


def test_probes_ask_addresses_that_answer_without_a_key(parts):
    addresses = {route.resource.canonical for route in create_app(FakeAsyncEngine()).router.routes() if route.resource}

    ports = {port["name"] for port in container(parts)["ports"]}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container(parts)[name]["httpGet"]
        assert probe["path"] in addresses & PUBLIC_PATHS and probe["port"] in ports
    assert container(parts)["livenessProbe"]["httpGet"]["path"] == "/version", "/health is 503 while draining"


def test_selectors_volumes_and_ports_fit(parts):
    labels = parts["Deployment"]["template"]["metadata"]["labels"]
    assert parts["Deployment"]["selector"]["matchLabels"] == labels == parts["Service"]["selector"]
    assert parts["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    spec = parts["Deployment"]["template"]["spec"]
    assert {v["name"] for v in spec["volumes"]} == {m["name"] for m in container(parts)["volumeMounts"]}
    assert parts["Service"]["ports"][0]["targetPort"] in {port["name"] for port in container(parts)["ports"]}


def test_the_pod_is_locked_down(parts):
    spec = parts["Deployment"]["template"]["spec"]
    security = container(parts)["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False and security["capabilities"]["drop"] == ["ALL"]
