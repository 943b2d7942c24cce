"""The rule by which workers share the frozen catalogue."""

from __future__ import annotations

import pytest

from bfm.objective.methods import METHODS, SHARE_ABOVE_BYTES, shares_catalogue


@pytest.mark.parametrize("method", METHODS)
def test_only_a_catalogue_too_large_for_each_worker_is_shared_unasked(method):
    assert shares_catalogue(method, 2, 1 << 20) == (method == "sharded")
    assert shares_catalogue(method, 2, SHARE_ABOVE_BYTES + 1) == (method in ("auto", "sharded"))
    assert shares_catalogue(method, 1, SHARE_ABOVE_BYTES + 1) == (method == "sharded")
