"""The cluster definitions, as far as they can be checked without a cloud: schemas, structure, and one another."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
RAY_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())

# Fields of ray.io/v1 (KubeRay 1.5), as far as these files may use them.
CLUSTER_FIELDS = {
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
AUTOSCALER_FIELDS = {"version", "upscalingMode", "idleTimeoutSeconds", "resources", "image", "env"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB_FIELDS = {
    "entrypoint",
    "runtimeEnvYAML",
    "submissionMode",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "activeDeadlineSeconds",
    "backoffLimit",
    "rayClusterSpec",
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", ["launcher.yaml", "one_machine/autoscaler.yaml"])
def test_the_autoscaler_s_own_schema_accepts(name: str) -> None:
    jsonschema.validate(load(name), RAY_SCHEMA)


def test_the_schema_would_notice_a_misspelt_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        jsonschema.validate({**load("launcher.yaml"), "idle_timeout": 5}, RAY_SCHEMA)


@pytest.mark.parametrize("name", ["launcher.yaml", "one_machine/autoscaler.yaml"])
def test_launched_heads_take_no_trials_and_workers_start_at_none(name: str) -> None:
    config = load(name)
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert types, "no workers"
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in types.values())
    assert config["max_workers"] >= max(kind["max_workers"] for kind in types.values())


def test_cloud_workers_are_spot_and_the_head_is_not() -> None:
    types = load("launcher.yaml")["available_node_types"]
    markets = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for name, kind in types.items()
    }
    assert markets == {"head": None, "cpu": "spot", "gpu": "spot"}
    assert types["gpu"]["resources"]["GPU"] == 1


def test_launched_nodes_authenticate() -> None:
    config = load("launcher.yaml")
    starts = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


def test_kuberay_cluster_scales_from_zero_with_autoscaler_v2() -> None:
    cluster = load("kuberay-cluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert set(spec) <= CLUSTER_FIELDS
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu", "gpu"]
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= GROUP_FIELDS
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_kuberay_pods_are_whole_and_never_restarted() -> None:
    for pod in pods(load("kuberay-cluster.yaml")["spec"]):
        assert pod["restartPolicy"] == "Never", "autoscaler v2 takes a restarted pod for the old Ray node"
        (container,) = pod["containers"]
        assert container["image"]
        assert container["name"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    gpu = pods(load("kuberay-cluster.yaml")["spec"])[-1]["containers"][0]["resources"]["limits"]
    assert gpu["nvidia.com/gpu"] == "1"


def test_ray_start_params_are_strings() -> None:
    spec = load("kuberay-cluster.yaml")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_kuberay_job_brings_the_same_cluster_and_ends_it() -> None:
    job = load("kuberay-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= JOB_FIELDS
    assert job["spec"]["rayClusterSpec"] == load("kuberay-cluster.yaml")["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert environment["env_vars"] == load("runtime_env.yaml")["env_vars"]


def test_the_job_runs_the_entry_point_on_a_search_space_of_the_image() -> None:
    words = load("kuberay-job.yaml")["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "ray_jobs.sweep"]
    inside = Path(words[3]).relative_to("/home/ray/bfm")
    assert (ROOT / inside).is_file()
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"COPY --chown=ray:users {inside.parts[0]} " in dockerfile
    assert "WORKDIR /home/ray/bfm" in dockerfile


def test_every_definition_names_the_installed_ray() -> None:
    wanted = version("ray")
    assert load("kuberay-cluster.yaml")["spec"]["rayVersion"] == wanted
    for name in ("launcher.yaml", "Dockerfile"):
        assert re.search(rf"rayproject/ray:{re.escape(wanted)}-", (CLUSTER / name).read_text()), name
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={wanted}" in pins


def test_the_image_is_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    images = {pod["containers"][0]["image"] for pod in pods(load("kuberay-cluster.yaml")["spec"])}
    assert images == {f"registry.example.com/bfm:{project['version']}"}


def test_the_shipped_code_is_small() -> None:
    environment = load("runtime_env.yaml")
    assert set(environment) == {"excludes", "env_vars"}
    assert {".git/", ".venv/", "quickstart/", "runs/"} <= set(environment["excludes"])
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
