"""The shop of the ranking tests, for tests of what writes exports."""

from tests.ranking.conftest import export, shop

__all__ = ["export", "shop"]
