"""The comparison behind `bfm doctor --loss`."""

from __future__ import annotations

import json
import subprocess
import sys

from bfm.objective.loss_check import METHODS, check_losses, losses_text


def test_every_implementation_agrees_or_says_why_it_cannot_run():
    rows = check_losses(num_queries=64, num_candidates=20_000, width=16, repeats=1)
    assert [row.method for row in rows] == list(METHODS)
    assert [row.method for row in rows if row.chosen] == ["one_pass"]
    for row in rows:
        json.dumps(row.as_dict())
        if row.available:
            assert row.log_sum_error < 1e-5
            assert row.gradient_error < 1e-5
            assert row.elapsed_s > 0
        else:
            assert row.note
            assert row.elapsed_s is None
    text = losses_text(rows).splitlines()
    assert len(text) == 2 + len(rows)
    assert "chosen at these sizes" in text[2]


def test_the_dense_table_takes_more_memory_than_tiles_of_it():
    # A fresh process: one that has held large arrays lends what it kept of them.
    code = (
        "import json; from bfm.objective.loss_check import check_losses;"
        "print(json.dumps([row.as_dict() for row in check_losses(num_queries=64, num_candidates=200_000, width=16)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    extra_mb = {row["method"]: row["extra_mb"] for row in json.loads(done.stdout)}
    assert extra_mb["reference"] > 2 * extra_mb["one_pass"]
