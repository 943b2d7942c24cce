"""The launcher's file and the roles beside it: Ray's schema, structure, and a dry run against a simulated AWS."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import ray.autoscaler
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

from tests.cluster_files import ROOT, image_of, load, sources_of_the_image

RAY_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


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


def test_nothing_is_installed_when_a_machine_starts() -> None:
    config = prepare_config(load("launcher.yaml"))
    assert [config[f"{whose}setup_commands"] for whose in ("", "head_", "worker_")] == [[], [], []]
    assert set(config["file_mounts"]) == {"/home/ray/.ray/auth_token"}, "the code is in the image"
    (login,) = config["initialization_commands"]
    assert login.endswith(config["docker"]["image"].partition("/")[0])
    assert config["provider"]["region"] in login


def test_launched_machines_run_the_image_of_their_kind() -> None:
    config = load("launcher.yaml")
    for kind in config["available_node_types"].values():
        image = kind.get("docker", {}).get("worker_image", config["docker"]["image"])
        assert image == image_of("gpu" if "GPU" in kind["resources"] else "cpu")
        assert kind.get("docker", {}).get("worker_run_options", []) == (["--gpus=all"] if "gpu" in image else [])


def test_launched_nodes_authenticate() -> None:
    config = load("launcher.yaml")
    head, worker = (config[f"{role}_start_ray_commands"] for role in ("head", "worker"))
    assert all("RAY_AUTH_MODE=token" in command for command in (head[1], *worker[1:]))


def test_every_worker_forwards_spot_notices() -> None:
    config = load("launcher.yaml")
    *_, start, watcher = config["worker_start_ray_commands"]
    assert "ray start --address" in start
    script = re.search(r"nohup python /home/ray/bfm/(\S+) aws .*&$", watcher)
    assert script, watcher
    assert (ROOT / script[1]).is_file()
    assert script[1] in sources_of_the_image()
    assert "spot_notice" not in str(config["head_start_ray_commands"])


@pytest.fixture
def account(tmp_path, monkeypatch):
    """An AWS account of nobody, with the roles of aws_iam.yaml, which are thereby checked by moto."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    resources = load_iam()
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        iam = boto3.client("iam", region_name="us-west-2")
        document = json.dumps(resources["Storage"]["PolicyDocument"])
        storage = iam.create_policy(PolicyName="Storage", PolicyDocument=document)["Policy"]["Arn"]
        for name in ("WorkerRole", "HeadRole"):
            role = resources[name]
            iam.create_role(
                RoleName=role["RoleName"], AssumeRolePolicyDocument=json.dumps(role["AssumeRolePolicyDocument"])
            )
            for policy in role["ManagedPolicyArns"]:
                iam.attach_role_policy(RoleName=role["RoleName"], PolicyArn=storage if policy == "Storage" else policy)
            for policy in role.get("Policies", []):
                text = json.dumps(policy["PolicyDocument"])
                iam.put_role_policy(RoleName=role["RoleName"], PolicyName=policy["PolicyName"], PolicyDocument=text)
        for name in ("WorkerProfile", "HeadProfile"):
            profile = resources[name]["InstanceProfileName"]
            iam.create_instance_profile(InstanceProfileName=profile)
            role = resources[resources[name]["Roles"][0]]["RoleName"]
            iam.add_role_to_instance_profile(InstanceProfileName=profile, RoleName=role)
        yield iam


def load_iam() -> dict[str, Any]:
    """Properties of the resources, with CloudFormation's functions worked out for a bucket and an account."""

    def work_out(value: Any) -> Any:
        if isinstance(value, list):
            return [work_out(part) for part in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"Ref"}:
            return value["Ref"]
        if set(value) == {"Fn::Sub"}:
            return value["Fn::Sub"].replace("${Bucket}", "bucket")
        if set(value) == {"Fn::GetAtt"}:
            resource, attribute = value["Fn::GetAtt"]
            assert attribute == "Arn"
            return f"arn:aws:iam::123456789012:role/{template[resource]['Properties']['RoleName']}"
        return {key: work_out(part) for key, part in value.items()}

    template = load("aws_iam.yaml")["Resources"]
    return {name: work_out(resource["Properties"]) for name, resource in template.items()}


def test_a_dry_run_of_the_launcher_starts_spot_workers_with_rights_in_one_zone(account) -> None:
    config = bootstrap_aws(prepare_config(load("launcher.yaml")))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        tags = {"ray-node-type": "head" if name == "head" else "worker", "ray-user-node-type": name}
        provider.create_node(dict(kind["node_config"]), {**tags, "ray-node-name": name}, 1)
    reservations = boto3.client("ec2", region_name="us-west-2").describe_instances()["Reservations"]
    machines = [machine for reservation in reservations for machine in reservation["Instances"]]
    assert len(machines) == 5
    assert {machine["Placement"]["AvailabilityZone"] for machine in machines} == {"us-west-2a"}
    for machine in machines:
        (kind,) = (tag["Value"] for tag in machine["Tags"] if tag["Key"] == "ray-user-node-type")
        role = "head" if kind == "head" else "worker"
        assert machine["IamInstanceProfile"]["Arn"].endswith(f"/bfm-{role}")
        assert machine.get("InstanceLifecycle") == (None if kind == "head" else "spot")


def test_the_head_hands_on_the_workers_role_alone(account) -> None:
    (passes, _) = account.get_role_policy(RoleName="bfm-head", PolicyName="workers")["PolicyDocument"]["Statement"]
    assert passes["Action"] == ["iam:PassRole"]
    assert passes["Resource"] == [account.get_role(RoleName="bfm-worker")["Role"]["Arn"]]
