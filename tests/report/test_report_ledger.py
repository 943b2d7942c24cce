"""The report of a sweep from the records of its ledger."""

from __future__ import annotations

import pytest

from bfm.report.tables import lost_tasks
from bfm.sweep.ledger.state import SweepState
from tests.report.planted import RUNGS, page_of, planted_sweep


def test_the_page_follows_the_ledger():
    rows = planted_sweep(6)["rows"]
    spec = {"name": "mini", "metric": {"name": "nll"}, "budget": {"ladder_flops": list(RUNGS), "total_flops": 10**13}}
    records: list[dict] = [{"kind": "opened"}, {"kind": "spec", "spec": spec}]
    for number in range(6):
        records.append(
            {"kind": "proposal", "trial": f"t{number:03d}", "number": number, "config": {}, "seed": 0, "params": 1000,
             "source": "random", "rejected": {"fewer than 100 steps": 1}}
        )  # fmt: skip
    for place, row in enumerate(rows):
        task = {"task_id": f"task-{place}", "trial": row["trial"], "rung": row["rung"], "reserved_flops": 10**11}
        records.append({"kind": "task", "task": task})
        if place == 2:
            lost = {"kind": "lost", "task_id": "task-2", "fault": "worker", "charged_flops": 10**11, "reason": "killed"}
            lost |= {"trial": row["trial"], "rung": row["rung"], "progress": None, "progress_flops": 0}
            records += [lost, {"kind": "task", "task": task | {"task_id": "task-2b"}}]
        task_id = "task-2b" if place == 2 else f"task-{place}"
        records.append({"kind": "row", "task_id": task_id, "row": row, "probes": []})
    state = SweepState.fold(records)
    assert sorted(map(str, state.all_rows())) == sorted(map(str, rows))
    assert state.spent_flops == pytest.approx(sum(row["task_flops"] for row in rows) + 1e11)
    assert state.cap_flops == 10**13
    assert lost_tasks(state) == [(rows[2]["trial"], rows[2]["rung"], "killed, 1e+11 FLOPs charged")]
    html = page_of({"rows": state.all_rows(), "state": state, "baselines": {}})
    assert "<h1><bdi>mini</bdi></h1>" in html
    assert "unfinished sweep" in html
    assert "fewer than 100 steps" in html
    assert "killed, 1e+11 FLOPs charged" in html
