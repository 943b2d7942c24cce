import pytest

from bfm.training.export import export_checkpoint
from tests.ranking.shop import make_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A raw log, its shard set and a checkpoint; see shop.py."""
    return make_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
def export(shop):
    """The checkpoint exported."""
    export_checkpoint(shop.checkpoint, str(shop.shards.path), shop.folder / "export")
    return shop.folder / "export"
