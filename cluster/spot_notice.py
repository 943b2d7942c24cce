"""Drains this machine's Ray node when its cloud says that the spot machine will go: `python spot_notice.py aws|gcp`.

Enters: what the metadata service says, asked every two seconds. Leaves: one `ray drain-node`, upon which the tasks of
this node leave a checkpoint and yield; then this ends. It runs beside `ray start` on every worker VM
(launcher.yaml). Pods need none of it: Kubernetes ends them through their preStop hook (kuberay-cluster.yaml).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

LOOK_S = 2.0
ANSWER_S = 2.0
GCP_NOTICE_S = 30
"""GCP says that a machine goes, not when: this long after it begins to say so."""
# A proxy of the environment would be asked for addresses that only this machine reaches.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def aws_notice() -> int | None:
    """Seconds that are left; None while nobody wants the machine back."""
    # The variables that each cloud's own SDK reads for the address of its metadata service.
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    token = _ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    try:
        said = _ask(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    at = datetime.fromisoformat(json.loads(said)["time"])
    return max(0, int((at - datetime.now(UTC)).total_seconds()))


def gcp_notice() -> int | None:
    """Seconds that are left; None while nobody wants the machine back."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    said = _ask(f"http://{host}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if said == "TRUE" else None


NOTICES: dict[str, Callable[[], int | None]] = {"aws": aws_notice, "gcp": gcp_notice}


def drain(left_s: int) -> bool:
    """Whether Ray has taken it. Without --node-id it is this machine's node."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    return subprocess.run([*command, "--deadline-remaining-seconds", str(left_s)]).returncode == 0


def watch(notice: Callable[[], int | None]) -> None:
    """Return when a notice has come and the node is drained."""
    answered = True
    while True:
        try:
            left_s = notice()
            answered = True
        except (OSError, ValueError, KeyError) as error:
            if answered:
                _say(f"the metadata service gives no answer: {error}")
            left_s, answered = None, False
        if left_s is not None:
            _say(f"this machine goes in {left_s} s")
            if drain(left_s):
                return
            _say("Ray did not take the drain; once more")
        time.sleep(LOOK_S)


def _ask(url: str, headers: dict[str, str], *, method: str = "GET") -> str:
    with _open(urllib.request.Request(url, headers=headers, method=method), timeout=ANSWER_S) as answer:
        return answer.read().decode().strip()


def _say(what: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {what}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=sorted(NOTICES))
    chosen = parser.parse_args().cloud
    if shutil.which("ray") is None:
        parser.error("there is no `ray` on the PATH; nothing could be drained")
    watch(NOTICES[chosen])
