"""What Ray's own autoscaler would start, of the groups that the cluster files define, for what a sweep asks."""

from __future__ import annotations

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

from bfm.sweep.space.spec import resolve
from ray_jobs.room import bundles
from tests.cluster_files import ROOT, load


def kuberay() -> dict[str, Any]:
    resource = load("kuberay-cluster.yaml")
    resource["metadata"]["namespace"] = "default"
    return _derive_autoscaling_config_from_ray_cr(resource)


FILES = {"kuberay": kuberay, "launcher": lambda: load("launcher.yaml")}


def started(config: dict[str, Any], wanted: list[dict[str, float]]) -> dict[str, int]:
    """Nodes per group for `request_resources(bundles=wanted)` on an empty cluster."""
    groups = {
        name: NodeTypeConfig(name, kind["min_workers"], kind["max_workers"], resources=kind["resources"])
        for name, kind in config["available_node_types"].items()
        if kind["max_workers"]
    }
    request = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for bundle in wanted])
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=groups,
            max_num_nodes=config["max_workers"],
            cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=request)],
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def task(workers: int, gpus: float) -> list[dict[str, float]]:
    scaling = {"workers": workers, "cpus": 4, "gpus": gpus}
    return [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles(scaling)]


def test_kuberay_s_autoscaler_reads_the_groups_as_they_are_meant() -> None:
    config = kuberay()
    assert config["provider"]["type"] == "kuberay"
    kinds = config["available_node_types"]
    assert {name: (kind["resources"]["CPU"], kind["resources"].get("GPU", 0)) for name, kind in kinds.items()} == {
        "headgroup": (0, 0),
        "cpu": (8, 0),
        "gpu-1": (8, 1),
        "gpu-4": (32, 4),
        "gpu-8": (64, 8),
    }


@pytest.mark.parametrize("name", FILES)
def test_a_task_brings_the_group_of_its_size(name: str) -> None:
    config = FILES[name]()
    assert started(config, task(1, gpus=0)) == {"cpu": 1}
    assert started(config, task(1, gpus=1)) == {"gpu-1": 1}
    assert started(config, task(1, gpus=0.5) * 2) == {"gpu-1": 1}
    assert started(config, task(4, gpus=1)) == {"gpu-4": 1}
    assert started(config, task(8, gpus=1)) == {"gpu-8": 1}


@pytest.mark.parametrize("name", FILES)
def test_the_groups_hold_all_slots_of_the_job_s_space(name: str) -> None:
    config = FILES[name]()
    space = load("kuberay-job.yaml")["spec"]["entrypoint"].split()[3].removeprefix("/home/ray/bfm/")
    spec = resolve(ROOT / space)
    for (tier,) in spec.scaling.tiers:
        wanted = task(tier.workers, tier.gpus) * spec.scaling.slots
        assert started(config, wanted), f"{spec.scaling.slots} tasks of {tier}: all of a request is started, or nothing"
