"""The report of a sweep from the records of its ledger."""

from __future__ import annotations

import pytest

from bfm.laws.frontier import Results
from bfm.report.sections import spend_table
from bfm.report.tables import lost_tasks, spend_text
from bfm.sweep.ledger.state import SweepState
from tests.report.planted import RUNGS, page_of, planted_sweep, view_of


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


def test_what_a_stopped_trial_trained_belongs_to_its_rung():
    """One yields halfway and goes on, one dies behind its checkpoint, one is on its way; one begins below again."""
    half, flops = 50_000_000_000, [100_000_000_000, 400_000_000_000]
    state = SweepState(spec={"budget": {"ladder_flops": flops, "total_flops": 10**12}}, finished="")
    for number in range(3):
        state.apply(
            {"kind": "proposal", "trial": f"t{number}", "number": number, "config": {}, "seed": 0, "params": 1000,
             "source": "random", "rejected": {}}
        )  # fmt: skip

    def reserve(trial: str, tried: int, reserved: int, rung: int = 0, **known: int) -> None:
        task = {"task_id": f"{trial}-{rung}-{tried}", "trial": trial, "rung": rung, "rung_flops": flops[rung]}
        state.apply({"kind": "task", "task": task | {"reserved_flops": reserved}, **known})

    def end(kind: str, task_id: str, charged: int) -> None:
        record = {"kind": kind, "task_id": task_id, "charged_flops": charged, "progress": "p", "progress_flops": half}
        state.apply(record | {"fault": "worker", "trial": "t1", "rung": 0, "reason": "killed"})

    def arrive(task_id: str, task_flops: int, status: str = "ok") -> None:
        trial, rung = task_id.split("-")[0], int(task_id.split("-")[1])
        row = {"trial": trial, "rung": rung, "rung_flops": flops[rung], "status": status, "task_flops": task_flops}
        row |= {"eval_flops": 0, "metrics": {"nll": 7.0} if status == "ok" else {}}
        state.apply({"kind": "row", "task_id": task_id, "row": row, "probes": []})

    for trial in ("t0", "t1", "t2"):
        reserve(trial, 0, 2 * half)
    end("yielded", "t0-0-0", half)
    end("lost", "t1-0-0", half + 10_000_000_000)
    end("yielded", "t2-0-0", half)
    reserve("t0", 1, half)
    arrive("t0-0-1", half)
    reserve("t1", 1, half)
    arrive("t1-0-1", half // 2, "diverged")
    reserve("t0", 0, flops[1], rung=1, redone_flops=2 * half)
    arrive("t0-1-0", flops[1])

    told = spend_table(view_of({"rows": state.all_rows(), "state": state, "baselines": {}}))
    assert [line[:3] for line in told.lines] == [
        ["rung 10\u00b9\u00b9", "1 result", "1.5\u00d710\u00b9\u00b9"],
        ["rung 4\u00d710\u00b9\u00b9", "1 result", "3\u00d710\u00b9\u00b9"],
        ["without a result", "1", "7.5\u00d710\u00b9\u2070"],
        ["lost", "", "10\u00b9\u2070"],
        ["redone for want of evicted trunks", "", "10\u00b9\u00b9"],
        ["left under the cap", "", "3.65\u00d710\u00b9\u00b9"],
    ]
    lines = spend_text(Results(state.all_rows()), state).splitlines()
    assert [line.split()[:5] for line in lines[2:4]] == [
        ["C", "1e11", "1", "1", "2.25e11"],
        ["C", "4e11", "1", "0", "3e11"],
    ]
    assert lines[-1].endswith(", 1e10 of them lost, 1e11 of them redone for want of evicted trunks")
