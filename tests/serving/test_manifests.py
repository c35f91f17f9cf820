"""The manifests of docs/kubernetes: they parse, their parts refer to each other, and the command is ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from speculators.deploy.process import GRACE_S
from speculators.deploy.serve import command_to_serve

FOLDER = Path(__file__).parents[2] / "docs" / "kubernetes"
DRAFTING = {"method": "eagle3", "num_speculative_tokens": 4, "model": "/models/drafter"}


def objects(name: str) -> dict[str, dict]:
    """kind/name -> object; a later one of the same name would replace the first, so names are unique."""
    documents = list(yaml.safe_load_all((FOLDER / name).read_text()))
    found = {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}
    assert len(found) == len(documents)
    return found


def pod_of(workload: dict) -> dict:
    template = workload["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    return template


@pytest.mark.parametrize(
    ("file", "workload"),
    [("serve.yaml", "Deployment/speculative-server"), ("multi-node.yaml", "StatefulSet/big-verifier")],
)
def test_the_parts_of_a_manifest_fit(file, workload):
    found = objects(file)
    template = pod_of(found[workload])
    spec = template["spec"]
    [container] = spec["containers"]
    assert spec["terminationGracePeriodSeconds"] > GRACE_S
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    services = [document for kind, document in found.items() if kind.startswith("Service/")]
    assert services
    for service in services:
        generated = {"apps.kubernetes.io/pod-index": "0"}  # Kubernetes labels the pods of a StatefulSet itself
        assert service["spec"]["selector"].items() <= {**template["metadata"]["labels"], **generated}.items()
    ports = {port["name"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
            assert "http" in ports


def test_the_command_is_what_serve_builds():
    [container] = pod_of(objects("serve.yaml")["Deployment/speculative-server"])["spec"]["containers"]
    args = ["--port", "8000", "--tensor-parallel-size", "1"]
    assert (*container["command"], *container["args"]) == command_to_serve(
        ["vllm"], "/models/verifier", DRAFTING, args
    ).command


def test_two_nodes_start_one_server(tmp_path):
    """The script itself, run with a vllm that prints its arguments."""
    import subprocess

    workload = objects("multi-node.yaml")["StatefulSet/big-verifier"]
    [container] = pod_of(workload)["spec"]["containers"]
    fake = tmp_path / "vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    seen = []
    for pod in range(workload["spec"]["replicas"]):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POD_NAME": f"big-verifier-{pod}"}
        command = [*container["command"], *container["args"]]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        seen.append(printed.splitlines())
    for rank, args in enumerate(seen):
        assert args[:2] == ["serve", "/models/verifier"]
        assert json.loads(args[args.index("--speculative-config") + 1]) == DRAFTING
        assert args[args.index("--node-rank") + 1] == str(rank)
        assert ("--headless" in args) == (rank > 0)
        limit = container["resources"]["limits"]["nvidia.com/gpu"]
        assert int(args[args.index("--tensor-parallel-size") + 1]) == limit * workload["spec"]["replicas"]
        address, service = args[args.index("--master-addr") + 1].split(".")
        assert (address, service) == ("big-verifier-0", workload["spec"]["serviceName"])
