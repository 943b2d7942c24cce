"""The final order of events, against a plain sort."""

import numpy as np
import pytest

from bfm.events.hashing import order_events


@pytest.mark.parametrize("hash_bits", [2, 5, 64], ids=["hashes differ in low bits only", "some do", "all bits"])
@pytest.mark.parametrize("num", [0, 1, 2, 300])
def test_events_stand_by_user_time_and_hash(num, hash_bits):
    rng = np.random.default_rng(num)
    user, time = rng.integers(0, 7, num).astype(np.int32), rng.integers(-(10**15), 10**15, 9)[rng.integers(0, 9, num)]
    row_hash = rng.integers(0, 2**hash_bits - 1, num, np.uint64, endpoint=True)
    order, repeated = order_events(user, time, row_hash)
    rows = list(zip(user.tolist(), time.tolist(), row_hash.tolist(), strict=True))
    ordered = [rows[place] for place in order]
    assert ordered == sorted(rows)
    assert sorted(order.tolist()) == list(range(num))
    assert repeated.tolist() == [place > 0 and row == ordered[place - 1] for place, row in enumerate(ordered)]
