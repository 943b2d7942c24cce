import os
import sys
from pathlib import Path

import pytest
import torch

from bfm import cli
from tests.helpers import make_shards

if not torch.cuda.is_available():
    # Read when triton is first imported, and many a module of torch imports it: kernels are interpreted on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Over several processes (`-n`) a file stays whole, and what may start a Ray cluster stays in one of them.

    The slow files of this folder stand alone: they have minutes to spare, and those of the rooms fill a process.
    """
    for item in items:
        place = item.path.relative_to(Path(__file__).parent)
        alone = len(place.parts) == 1 and item.get_closest_marker("slow")
        may_start_ray = not alone and (len(place.parts) == 1 or place.parts[0] in ("ray_jobs", "chaos"))
        item.add_marker(pytest.mark.xdist_group("ray" if may_start_ray else str(place)))


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory):
    """A small finished shard set (80 users, 60 items, ties in time, split by time); see tests/helpers.py."""
    return make_shards(tmp_path_factory.mktemp("shards") / "toy")


@pytest.fixture(scope="session")
def s3_server():
    """An S3 server on loopback; the environment names it from then on, as a user's would."""
    from tests.buckets import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_server):
    """The URI of a new bucket."""
    s3_server.faults.clear()
    return s3_server.bucket()


@pytest.fixture
def bfm(monkeypatch, capsys):
    """Run a verb; (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bfm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run
