import dataclasses
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from bfm.events.describe import describe, format_description
from bfm.events.ties import Ties, count_ties, tie_facts
from bfm.units import format_count
from tests.helpers import history_of, make_shards


def test_figures_equal_brute_force(tmp_path, monkeypatch):
    monkeypatch.setattr("bfm.events.shards._CHUNK_EVENTS", 100)
    shards = make_shards(tmp_path, users=50, num_parts=3)
    found = describe(shards)
    json.dumps(found, allow_nan=False)
    repeats = ties = 0
    counts = Counter()
    for user in range(50):
        history = history_of(shards, user)
        repeats += len(history.item) - len(set(history.item.tolist()))
        ties += int((np.diff(history.time) == 0).sum())
        counts.update(history.item[: history.train_end].tolist())
    pairs = shards.manifest.events - 50
    assert found["repeat_share"] == pytest.approx(repeats / shards.manifest.events)
    assert found["ties_stored"]["pairs"] == ties
    assert found["ties_stored"]["share"] == pytest.approx(ties / pairs)
    values = sorted(counts.values())
    differences = sum(abs(a - b) for a in values for b in values)
    assert found["popularity"]["gini"] == pytest.approx(differences / (2 * len(values) * sum(values)))
    assert found["popularity"]["top_1_percent_share"] == pytest.approx(values[-1] / sum(values))
    parts = found["split"]
    assert parts["train"]["events"] + parts["validation"]["events"] + parts["test"]["events"] == shards.manifest.events
    assert found["history_length"]["max"] == shards.user_lengths.max()


@pytest.mark.parametrize("options", [{}, {"clock": False, "split": "leave_one_out"}])
def test_text_has_the_figures_and_the_warnings(tmp_path, options):
    shards = make_shards(tmp_path, users=50, every_kind=True, **options)
    sorted_ties = tie_facts(count_ties(np.zeros(200), np.zeros(200), {"product": pa.array(np.arange(200))}))
    checks = {"ties": sorted_ties, "conflicts": {"price": 0.25, "category": 0.0}}
    shards.manifest = dataclasses.replace(shards.manifest, checks=checks)
    text = format_description(describe(shards))
    rows = sum(field.rows for field in shards.manifest.fields)
    assert f"tables         {format_count(rows)} rows in all: training holds {rows * 256 / 2**20:.3g} MiB" in text
    assert f"item_id: hashed, 1.02k table rows, {shards.num_catalogue / 512:.2g} items a row" in text
    assert f"{shards.manifest.events:,} events, 50 users" in text
    assert "price 0.25" in text
    assert "warning: the raw order inside ties is monotone" in text
    assert "product rises in 100.0%" in text
    assert ("positions" in text) == (not shards.manifest.has_clock)
    assert text.index("validation     ") < text.index("test           ")


def test_ties_are_counted_per_user_and_column():
    user = np.array([1, 1, 1, 1, 2, 2, 2])
    time = np.array([5, 5, 5, 6, 6, 6, 6])
    columns = {
        "up": pa.array([1, 2, 3, 0, 1, 2, 3]),
        "down": pa.array([3.0, 2.0, 1.0, 9.0, 3.0, 2.0, 1.0]),
        "same": pa.array(np.zeros(7)),
        "text": pa.array(["b", "a", "c", "z", None, "x", "y"]),
    }
    ties = count_ties(user, time, columns)
    assert (ties["tied", ""], ties["neighbours", ""]) == (4, 5)
    facts = tie_facts(ties)
    assert facts["ascending_share"] == {"up": 1.0, "down": 0.0, "text": pytest.approx(2 / 3, abs=1e-6)}
    half = count_ties(user[:4], time[:4], {k: v[:4] for k, v in columns.items()})
    rest = count_ties(user[4:], time[4:], {k: v[4:] for k, v in columns.items()})
    assert half + rest == ties == Ties() + ties
    assert facts["warning"] is None, "too few pairs to say anything"


def test_only_monotone_columns_are_warned_of():
    rng = np.random.default_rng(0)
    user, time = np.repeat(np.arange(100), 10), np.zeros(1000)
    rising = np.tile(np.arange(10), 100)
    columns = {"sorted": pa.array(rising), "falling": pa.array(-rising), "free": pa.array(rng.random(1000))}
    warning = tie_facts(count_ties(user, time, columns))["warning"]
    assert "sorted rises" in warning
    assert "falling falls" in warning
    assert "free" not in warning
    assert tie_facts(count_ties(user, time, {"free": columns["free"]}))["warning"] is None


def test_stored_order_of_honest_shards_raises_no_warning(toy_shards):
    assert describe(toy_shards)["ties_stored"]["warning"] is None
