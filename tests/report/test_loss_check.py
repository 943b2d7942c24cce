"""The comparison behind `bfm doctor --loss`."""

from __future__ import annotations

import json

from bfm.report.loss_check import METHODS, check_losses, losses_text


def test_every_implementation_agrees_or_says_why_it_cannot_run():
    rows = check_losses(num_rows=64, num_candidates=20_000, width=16, repeats=1)
    assert [row.method for row in rows] == list(METHODS)
    assert [row.method for row in rows if row.chosen] == ["one_pass"]
    for row in rows:
        json.dumps(row.as_dict())
        if row.available:
            assert row.loss_error < 1e-5
            assert row.gradient_error < 1e-5
            assert row.elapsed_s > 0
        else:
            assert row.note
            assert row.elapsed_s is None
    text = losses_text(rows).splitlines()
    assert len(text) == 2 + len(rows)
    assert "chosen at these sizes" in text[2]
    by_method = {row.method: row for row in rows}
    assert by_method["reference"].extra_mb > 2 * by_method["one_pass"].extra_mb
