import pytest

from tests.helpers import make_shards


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory):
    """A small finished shard set (80 users, 60 items, ties in time, split by time); see tests/helpers.py."""
    return make_shards(tmp_path_factory.mktemp("shards") / "toy")
