import itertools
import shutil

import numpy as np
import pytest

from bfm.events import statistics as module
from bfm.events.shards import Shards
from bfm.events.statistics import group_means, inclusion_elsewhere, target_windows
from bfm.events.windows import WindowOrder
from tests.helpers import make_shards
from tests.model.toys import batch_of


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough events and items for groups of many sizes."""
    return make_shards(tmp_path_factory.mktemp("many") / "shards", users=300, items=800, max_events=90, num_parts=2)


def all_windows(shards, window):
    order = WindowOrder(shards, window, 1, shards.manifest.seed)
    return order.windows(np.arange(order.windows_per_epoch))


@pytest.mark.parametrize("window", [2, 16, 64])
def test_target_windows_equal_brute_force(toy_shards, window):
    targets_RL = all_windows(toy_shards, window).target_RL
    count_V = target_windows(toy_shards, window)
    for item in range(toy_shards.num_catalogue):
        assert count_V[item] == (targets_RL == item).any(1).sum()
    # Cached or computed: the same numbers.
    assert toy_shards.kept_path(f"target-windows-L{window}").exists()
    assert np.array_equal(target_windows(toy_shards, window), count_V)


def test_inclusion_is_the_share_of_choices_of_other_windows(tmp_path):
    """Every choice of the other windows, counted, for every window and every item that the window does not hold."""
    shards = make_shards(tmp_path, users=12, items=30, max_events=9)
    targets_RL = all_windows(shards, 8).target_RL
    num_windows = len(targets_RL)
    assert 5 <= num_windows <= 12
    for group_windows in (1, 2, 3):
        pi_V = inclusion_elsewhere(shards, 8, group_windows)
        for item in range(shards.num_catalogue):
            holds_R = (targets_RL == item).any(1)
            if not holds_R.any():
                continue
            own = int(np.flatnonzero(~holds_R)[0]) if not holds_R.all() else None
            if own is None:
                continue
            others = [holds for window, holds in enumerate(holds_R) if window != own]
            chosen = [any(choice) for choice in itertools.combinations(others, group_windows - 1)]
            assert pi_V[item] == pytest.approx(np.mean(chosen), abs=1e-12)


def test_items_that_are_no_target_count_as_if_in_one_window(tmp_path):
    shards = make_shards(tmp_path, users=150, items=2000, max_events=12)
    never = np.flatnonzero(target_windows(shards, 16) == 0)
    num_windows = WindowOrder(shards, 16, 1, 0).windows_per_epoch
    assert len(never) > 0
    assert inclusion_elsewhere(shards, 16, 3)[never] == pytest.approx(2 / (num_windows - 1))


def test_larger_groups_than_an_epoch_hold_everything(toy_shards):
    num_windows = WindowOrder(toy_shards, 8, 1, 0).windows_per_epoch
    assert inclusion_elsewhere(toy_shards, 8, num_windows) == pytest.approx(1.0)
    assert inclusion_elsewhere(toy_shards, 8, 10 * num_windows) == pytest.approx(1.0)


@pytest.mark.parametrize(("window", "group_windows"), [(8, 2), (32, 4), (64, 16), (50, 13), (24, 100)])
def test_group_means_counts_equal_those_of_groups(many, window, group_windows):
    order = WindowOrder(many, window, group_windows, seed=3)
    groups = [order.groups([index]) for index in range(200)]
    embedded = [np.union1d(group.item_RL, group.target_RL) for group in groups]
    items = [len(ids[ids >= 0]) for ids in embedded]
    targets = [len(np.unique(group.target_RL[group.target_RL >= 0])) for group in groups]
    rows = [(group.target_RL >= 0).sum() for group in groups]
    baskets = WindowOrder(many, window, group_windows, seed=3, targets="next_basket")
    queries = [batch_of([baskets.groups([index])]).groups[0].queries for index in range(200)]
    expected = group_means(many, window, group_windows, "next_basket")
    assert expected.distinct_items_mean == pytest.approx(np.mean(items), rel=0.01)
    assert expected.distinct_targets_mean == pytest.approx(np.mean(targets), rel=0.01)
    assert expected.targets_mean == pytest.approx(np.mean(rows), rel=0.02)
    assert expected.queries_mean == pytest.approx(np.mean(queries), rel=0.01)
    assert expected.queries_mean < expected.targets_mean
    plain = group_means(many, window, group_windows)
    assert plain.queries_mean == plain.targets_mean == expected.targets_mean


def test_an_epoch_and_beyond(many):
    num_windows = WindowOrder(many, 32, 1, 0).windows_per_epoch
    whole = group_means(many, 32, num_windows)
    assert whole.distinct_items_mean == pytest.approx(many.num_catalogue)
    assert whole.targets_mean == pytest.approx(many.manifest.train_targets)
    twice = group_means(many, 32, 2 * num_windows)
    assert twice.distinct_items_mean == pytest.approx(many.num_catalogue)
    assert twice.targets_mean == pytest.approx(2 * many.manifest.train_targets)


def test_a_sample_of_the_windows_is_enough(many, monkeypatch):
    whole = group_means(many, 8, 4, "next_basket")
    monkeypatch.setattr(module, "_SAMPLE_POSITIONS", many.manifest.train_events // 3)
    sampled = group_means(many, 8, 4, "next_basket")
    assert sampled != whole
    for name, mean in vars(whole).items():
        assert getattr(sampled, name) == pytest.approx(mean, rel=0.03)


def test_a_damaged_cache_is_computed_again(toy_shards, tmp_path):
    shutil.copytree(toy_shards.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    shards = Shards.open(tmp_path / "copy")
    first = target_windows(shards, 16)
    path = shards.kept_path("target-windows-L16")
    path.write_bytes(path.read_bytes()[:-5])
    assert np.array_equal(target_windows(shards, 16), first)
