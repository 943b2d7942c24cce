"""The rule by which workers share the frozen catalogue, and what a stage takes of a method of the other."""

from __future__ import annotations

import pytest

from bfm.objective.methods import CONSTANT_ONLY, METHODS, SHARE_ABOVE_BYTES, method_for_live, shares_catalogue


@pytest.mark.parametrize("method", METHODS)
def test_only_a_catalogue_too_large_for_each_worker_is_shared_unasked(method):
    assert shares_catalogue(method, 2, 1 << 20) == (method == "sharded")
    assert shares_catalogue(method, 2, SHARE_ABOVE_BYTES + 1) == (method in ("auto", "sharded"))
    assert shares_catalogue(method, 1, SHARE_ABOVE_BYTES + 1) == (method == "sharded")


@pytest.mark.parametrize("method", METHODS)
def test_stage_1_leaves_methods_of_frozen_candidates_to_stage_2(method):
    assert method_for_live(method) == ("auto" if method in CONSTANT_ONLY else method)
