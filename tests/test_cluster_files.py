"""The Kubernetes definitions, the images and what is shipped: structure, and their agreement with one another."""

from __future__ import annotations

import json
import re
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from bfm.sweep.space.spec import resolve
from ray_jobs.preemption import _GRACE_S, LOOK_S
from ray_jobs.room import total_of
from tests.cluster_files import CLUSTER, ROOT, image_of, load, of_kind, sources_of_the_image

AWS_NOTICE_S = 120
GIB = 2**30

# Fields of ray.io/v1 (KubeRay 1.5), as far as these files may use them.
CLUSTER_FIELDS = {
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "authOptions",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
AUTOSCALER_FIELDS = {"version", "upscalingMode", "idleTimeoutSeconds", "resources", "image", "env"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB_FIELDS = {
    "entrypoint",
    "runtimeEnvYAML",
    "submissionMode",
    "submitterPodTemplate",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "activeDeadlineSeconds",
    "backoffLimit",
    "rayClusterSpec",
}


def cluster_spec() -> dict[str, Any]:
    return load("kuberay-cluster.yaml")["spec"]


def groups() -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster_spec()["workerGroupSpecs"]}


def pod_of(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def pods() -> list[dict[str, Any]]:
    return [pod_of(group) for group in (cluster_spec()["headGroupSpec"], *groups().values())]


def bytes_of(quantity: str) -> int:
    assert quantity.endswith("Gi"), quantity
    return int(quantity[:-2]) * GIB


def test_kuberay_cluster_scales_from_zero_with_autoscaler_v2() -> None:
    cluster = load("kuberay-cluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert set(spec) <= CLUSTER_FIELDS
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    assert list(groups()) == ["cpu", "gpu-1", "gpu-4", "gpu-8"]
    for group in groups().values():
        assert set(group) <= GROUP_FIELDS
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_kuberay_pods_are_whole_and_never_restarted() -> None:
    for pod in pods():
        assert pod["restartPolicy"] == "Never", "autoscaler v2 takes a restarted pod for the old Ray node"
        (container,) = pod["containers"]
        assert container["name"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["image"] == image_of("gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu")


def test_ray_is_told_what_the_pod_has() -> None:
    for name, group in groups().items():
        told = group["rayStartParams"]
        assert all(isinstance(value, str) for value in told.values()), "KubeRay takes strings alone"
        limits = pod_of(group)["containers"][0]["resources"]["limits"]
        assert told["num-cpus"] == limits["cpu"]
        assert told.get("num-gpus") == limits.get("nvidia.com/gpu") == (name[4:] or None if "gpu" in name else None)


def test_shared_memory_holds_the_object_store_and_nccl() -> None:
    for group in (group for group in groups().values() if "num-gpus" in group["rayStartParams"]):
        pod, told = pod_of(group), group["rayStartParams"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        size = bytes_of(volume["emptyDir"]["sizeLimit"])
        assert size == int(told["object-store-memory"]) + 2 * GIB * int(told["num-gpus"])
        assert size < bytes_of(container["resources"]["limits"]["memory"]) / 4, "it is taken from the pod's memory"


def test_a_pod_that_ends_drains_its_node_and_has_time_to() -> None:
    for group in groups().values():
        pod = pod_of(group)
        *_, hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook.startswith("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")
        wait_s = int(re.search(r"&& sleep (\d+)$", hook)[1])
        deadline_s = int(re.search(r"--deadline-remaining-seconds (\d+)", hook)[1])
        grace_s = pod["terminationGracePeriodSeconds"]
        assert wait_s >= 2 * LOOK_S, "a task has looked, and written its checkpoint"
        assert wait_s + _GRACE_S <= deadline_s < grace_s < AWS_NOTICE_S
        assert grace_s - wait_s - _GRACE_S >= 10, "for the drain itself"


def test_workers_are_spot_in_one_zone_and_the_head_is_kept() -> None:
    (selector,) = {json.dumps(pod_of(group)["nodeSelector"]) for group in groups().values()}
    assert json.loads(selector) == {
        "eks.amazonaws.com/capacityType": "SPOT",
        "topology.kubernetes.io/zone": load("launcher.yaml")["provider"]["availability_zone"],
    }
    head = cluster_spec()["headGroupSpec"]
    assert pod_of(head)["nodeSelector"] == {"eks.amazonaws.com/capacityType": "ON_DEMAND"}
    assert head["template"]["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }


@pytest.mark.parametrize(("name", "instance"), [("kuberay-cluster.yaml", "bfm"), ("kuberay-job.yaml", "bfm-sweep")])
def test_a_disruption_budget_is_the_head_s(name: str, instance: str) -> None:
    (budget,) = of_kind(name, "PodDisruptionBudget")
    assert load(name)["metadata"]["name"] == instance
    spec = load(name)["spec"]
    labels = spec.get("rayClusterSpec", spec)["headGroupSpec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["minAvailable"] == 1, "of pods without a Deployment only a whole number is known"
    assert budget["spec"]["selector"]["matchLabels"] == {"ray.io/node-type": "head", **labels}
    assert labels == {"app.kubernetes.io/instance": instance}


def test_what_the_pods_name_is_among_the_prerequisites() -> None:
    (account,) = of_kind("kuberay-prerequisites.yaml", "ServiceAccount")
    values = {
        thing["metadata"]["name"]: thing["value"] for thing in of_kind("kuberay-prerequisites.yaml", "PriorityClass")
    }
    submitter = load("kuberay-job.yaml")["spec"]["submitterPodTemplate"]["spec"]
    assert {pod["serviceAccountName"] for pod in (*pods(), submitter)} == {account["metadata"]["name"]}
    head, *workers = [pod["priorityClassName"] for pod in pods()]
    assert values[head] > 0 > values[workers[0]] > -10
    assert set(workers) == {workers[0]}
    comments = (CLUSTER / "kuberay-prerequisites.yaml").read_text()
    for secret in account["imagePullSecrets"]:
        assert f"create secret docker-registry {secret['name']} " in comments


def test_the_standing_cluster_s_head_is_remembered_by_redis() -> None:
    told = cluster_spec()["gcsFaultToleranceOptions"]
    (service,) = of_kind("kuberay-prerequisites.yaml", "Service")
    (redis,) = of_kind("kuberay-prerequisites.yaml", "StatefulSet")
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == redis["spec"]["selector"]["matchLabels"] == labels
    assert told["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    (password,) = container["env"]
    assert told["redisPassword"]["valueFrom"] == password["valueFrom"]
    assert f"$({password['name']})" in container["args"]
    secret = password["valueFrom"]["secretKeyRef"]
    comments = (CLUSTER / "kuberay-prerequisites.yaml").read_text()
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in comments


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_kueue_can_admit_it(name: str) -> None:
    metadata, spec = load(name)["metadata"], load(name)["spec"]
    assert metadata["labels"] == {"kueue.x-k8s.io/queue-name": "bfm"}
    assert metadata["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}, "it refuses autoscaling otherwise"
    assert len(spec.get("rayClusterSpec", spec)["workerGroupSpecs"]) <= 7
    assert spec.get("shutdownAfterJobFinishes", True) is True


# ---- the job


def test_kuberay_job_brings_the_same_cluster_and_ends_it() -> None:
    job = load("kuberay-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= JOB_FIELDS
    standing = cluster_spec()
    del standing["gcsFaultToleranceOptions"]
    standing["headGroupSpec"]["template"]["metadata"]["labels"] = {"app.kubernetes.io/instance": "bfm-sweep"}
    assert job["spec"]["rayClusterSpec"] == standing
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["submissionMode"] == "K8sJobMode"
    (submitter,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["image"] == standing["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert environment["env_vars"] == load("runtime_env.yaml")["env_vars"]


def test_the_job_runs_a_space_of_the_image_on_gpus_that_its_groups_have() -> None:
    words = load("kuberay-job.yaml")["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "ray_jobs.sweep"]
    assert words[-2:] == ["--resume", "auto"]
    inside = Path(words[3]).relative_to("/home/ray/bfm")
    assert inside.parts[0] in sources_of_the_image()
    spec = resolve(ROOT / inside)
    limits = [pod_of(group)["containers"][0]["resources"]["limits"] for group in groups().values()]
    for (tier,) in spec.scaling.tiers:
        needed = total_of(tier.scaling(tier.workers))
        assert needed["GPU"] >= 1
        assert any(
            float(limit["cpu"]) >= needed["CPU"] and float(limit.get("nvidia.com/gpu", 0)) >= needed["GPU"]
            for limit in limits
        ), f"{tier} fits on no one machine"


# ---- images, and what is shipped


def test_every_definition_names_the_installed_ray() -> None:
    wanted = version("ray")
    assert cluster_spec()["rayVersion"] == wanted
    bases = re.findall(r"^FROM rayproject/ray:(\S+)-py311-(\S+) AS (\S+)$", dockerfile(), re.MULTILINE)
    assert bases == [(wanted, "cpu", "cpu"), (wanted, "gpu", "gpu")]
    assert "FROM ${DEVICE}" in dockerfile()
    assert f"ray=={wanted}" in (ROOT / "constraints.txt").read_text().splitlines()


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def test_the_builder_is_sent_what_it_copies_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == sources_of_the_image()
    assert all((ROOT / source).exists() for source in sources_of_the_image())
    assert not names_of_the_documents() & sources_of_the_image()


def names_of_the_documents() -> set[str]:
    """The folders and files that the documents' commands write data, runs, models and lists into."""
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(file.read_text() for file in files)
    written = re.findall(r"--(?:out|storage) ([a-z][\w/.]+)(?!:)\b", text) + re.findall(r"'(\w+)/\*", text)
    written += re.findall(r"^QUICKSTART \?= (\w+)", text, re.MULTILINE)
    written += re.findall(r"bfm data synth (\w+)", text)
    # Spaces and schemas are what a job is told.
    return {name.partition("/")[0] for name in written if not name.endswith(".yaml")}


def test_the_shipped_code_is_code(tmp_path) -> None:
    environment = load("runtime_env.yaml")
    assert set(environment) == {"excludes", "env_vars"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    names = names_of_the_documents()
    assert names >= {"shards", "run", "runs", "model", "logs", "quickstart"}
    code = ["bfm/model/fields.py", "bfm/cli/run.py", "ray_jobs/sweep.py", "search_spaces/quickstart.yaml"]
    here = tmp_path / "here"
    for file in (
        *code,
        *(name if "." in name else f"{name}/deep/part.bin" for name in names),
        ".venv/x",
        ".git/x",
        "tests/x",
    ):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text("x")
    package = tmp_path / "package.zip"
    create_package(str(here), package, include_gitignore=False, excludes=environment["excludes"])
    shipped = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert shipped == set(code)


# ---- the README beside them


def test_every_placeholder_is_explained_and_none_is_stale() -> None:
    readme = (CLUSTER / "README.md").read_text()
    rows = re.findall(r"^\| (`.+?) \|", readme.partition("## What to fill in")[2], re.MULTILINE)
    explained = {word for row in rows for word in re.findall(r"`([^`]+)`", row)}
    files = [path for path in CLUSTER.glob("*") if path.suffix in (".yaml", "") and path.is_file()]
    text = "\n".join(path.read_text() for path in files)
    assert set(re.findall(r"(?:[/=]|::)([A-Z]{4,}(?:\.yaml)?)\b", text)) <= explained
    for word in explained:
        assert word in text, f"{word} is in no file"


def test_every_file_is_named_in_the_readme() -> None:
    readme = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        assert path.name in ("README.md", "__pycache__") or f"`{path.name}" in readme, path.name


def test_a_volume_is_mounted_where_the_readme_stores() -> None:
    readme = (CLUSTER / "README.md").read_text()
    pod = yaml.safe_load(re.search(r"```yaml\n(.+?)```", readme, re.DOTALL)[1])["spec"]
    (mount,), (volume,) = pod["containers"][0]["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert f"--storage {mount['mountPath']}/" in readme
    assert f"data.shards={mount['mountPath']}/" in readme
