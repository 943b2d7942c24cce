"""Rows spread over files: every partition, coarser or finer than the bins, has all rows of its users."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bfm.events.spread import SPREAD, gather, num_partitions, write_spread


@pytest.mark.parametrize("partitions", [1, 4, 256, 1024])
def test_partitions_hold_every_row_once_and_users_whole(tmp_path, partitions):
    rng = np.random.default_rng(0)
    hash_of_user = np.concatenate([np.array([0, 2**64 - 1], np.uint64), rng.integers(0, 2**64, 300, np.uint64)])
    rows = []
    for number in range(3):
        user = np.sort(rng.integers(0, len(hash_of_user), 500))
        user = user[np.argsort(hash_of_user[user], kind="stable")]
        table = pa.table({"user": user, SPREAD: hash_of_user[user]})
        write_spread(tmp_path / f"{number}", table)
        rows += user.tolist()
    files = sorted(tmp_path.iterdir())
    found = [gather(files, partitions, index)["user"].to_pylist() for index in range(partitions)]
    assert sorted(user for part in found for user in part) == sorted(rows)
    users = [set(part) for part in found]
    assert sum(map(len, users)) == len(set(rows))


def test_partitions_are_powers_of_two_of_about_the_wanted_size():
    assert [num_partitions(rows, 100) for rows in (0, 199, 200, 399, 400, 100_000)] == [1, 1, 2, 2, 4, 512]
