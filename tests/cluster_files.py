"""Reading of the cluster definitions, for the tests that hold them against one another."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"


def load(name: str) -> dict[str, Any]:
    """The first document."""
    return load_all(name)[0]


def load_all(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def of_kind(name: str, kind: str) -> list[dict[str, Any]]:
    return [document for document in load_all(name) if document["kind"] == kind]


def image_of(device: str) -> str:
    """That of this version of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"registry.example.com/bfm:{project['version']}-{device}"


def sources_of_the_image() -> set[str]:
    """What the Dockerfile copies."""
    lines = re.findall(r"^COPY --chown=ray:users (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    return {source for line in lines for source in line.split()}
