"""The streamed first k items against a full stable sort, and how little of a block it looks at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bfm.ranking.top_items import GROUP, TopItems, TopKeys


def collect(table_RV, k, width, kind=TopItems):
    """First items of a table that arrives in blocks of one width, padded to whole groups."""
    collector, start = kind(len(table_RV), k, table_RV), 0
    while start < table_RV.shape[1]:
        block = table_RV[:, start : start + width]
        padded = torch.nn.functional.pad(block, (0, -block.shape[1] % GROUP), value=-torch.inf)
        collector.add(padded, padded.unflatten(1, (-1, GROUP)).amax(-1), start)
        start += width
    return collector.finish()


def check(table_RV, k, first):
    value, order = torch.sort(table_RV, dim=1, descending=True, stable=True)
    k = min(k, table_RV.shape[1])
    present = value[:, :k] > -torch.inf
    torch.testing.assert_close(first.value_Rk[:, :k], value[:, :k], rtol=0, atol=0)
    assert torch.equal(first.id_Rk[:, :k], torch.where(present, order[:, :k], -1))
    last_R = first.value_Rk[:, -1]
    known = last_R > -torch.inf
    assert torch.equal(first.equal_R[known], (table_RV == last_R[:, None]).sum(1)[known])


@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(1, 700),
    k=st.sampled_from([1, 2, 10, 80]),
    levels=st.sampled_from([1, 2, 5, 1000]),
    hidden=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    width=st.sampled_from([64, 130, 500, 1000]),
    trend=st.sampled_from([0, 1, -1]),
    kind=st.sampled_from([TopItems, TopKeys]),
)
@settings(max_examples=120, deadline=None)
def test_equals_a_stable_sort(seed, num_items, k, levels, hidden, width, trend, kind):
    generator = torch.Generator().manual_seed(seed)
    table_RV = torch.randint(levels, (5, num_items), generator=generator).float()
    # Rising scores replace the whole list again and again; falling ones leave it alone.
    table_RV += trend * (torch.arange(num_items) // 20)
    table_RV[torch.rand(5, num_items, generator=generator) < hidden] = -torch.inf
    check(table_RV, k, collect(table_RV, k, width, kind))


@pytest.mark.parametrize("kind", [TopItems, TopKeys])
def test_scores_of_both_signs_and_both_zeros_are_in_order(kind):
    generator = torch.Generator().manual_seed(0)
    table_RV = torch.randn(4, 500, generator=generator) * 10.0 ** torch.randint(-30, 30, (4, 500), generator=generator)
    table_RV[:, ::3] = 0.0
    table_RV[:, ::7] *= -1.0
    assert ((table_RV == 0) & table_RV.signbit()).any()
    # The list ends among the zeros, and among the negative scores.
    for k in (10, 200, 400):
        check(table_RV, k, collect(table_RV, k, 128, kind))


@pytest.mark.parametrize("trend", [0.0, 1.0])
def test_ties_and_rising_scores_do_not_pile_up(trend):
    table_RV = (torch.arange(20_000) // 128 * trend).float().repeat(8, 1)
    check(table_RV, 10, collect(table_RV, 10, 256))
    held = 0
    collector = TopItems(8, 10, table_RV)
    for start in range(0, 20_000 - 256, 256):
        block = table_RV[:, start : start + 256]
        collector.add(block, block.unflatten(1, (-1, GROUP)).amax(-1), start)
        held = max(held, sum(len(part.id_E) for part in collector._kept))
    assert held <= 3 * 8 * 256
