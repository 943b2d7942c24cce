import pytest

from tests.chaos.sweeps import Decisions, decisions, one_place, unbroken


@pytest.fixture(scope="session")
def whole(tmp_path_factory, toy_shards) -> Decisions:
    """What comes of `one_place` if nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    return decisions(unbroken(one_place(folder, toy_shards.path), folder))
