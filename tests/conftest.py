import os

import pytest
import torch

from tests.helpers import make_shards

if not torch.cuda.is_available():
    # Read when triton is first imported, and many a module of torch imports it: kernels are interpreted on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory):
    """A small finished shard set (80 users, 60 items, ties in time, split by time); see tests/helpers.py."""
    return make_shards(tmp_path_factory.mktemp("shards") / "toy")
