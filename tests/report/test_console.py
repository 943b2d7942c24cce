"""What a person reads on the way."""

import math
import os
import random
from dataclasses import replace
from types import SimpleNamespace

from bfm.laws.frontier import Results
from bfm.report.console import Display, Leaders, memorising_words, step_words, validation_text
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.plan import crowding, machine
from tests.report.planted import VALIDATION

BAD = replace(
    VALIDATION,
    path_flops=10**13,
    phase="cooldown",
    epochs=26.2,
    metrics={"nll": 12.24, "recall@10": 0.06},
    rise=3.55,
    rise_error=0.08,
    loss_fall=2.5,
    memorises=True,
)


def test_a_validation_names_the_strongest_floor_and_the_side():
    assert validation_text(VALIDATION) == (
        "validation at C 1.2e12, 3.1 epochs: nll 8.690 \u00b1 0.040 (above popularity 9.24), "
        "recall@10 0.0312 (BELOW co-occurrence 0.05); the best so far"
    )
    assert memorising_words(VALIDATION) == ""


def test_a_model_that_memorises_is_told_so_and_what_to_do():
    line, warning = validation_text(BAD).splitlines()
    assert "C 1e13, cooled, 26 epochs: nll 12.240" in line
    assert "(BELOW popularity 9.24)" in line
    assert line.endswith("best nll 8.69 at C 1.2e12, 3.1 epochs")
    assert "memorises: nll is 3.550 \u00b1 0.080 above its best" in warning
    assert "training loss fell by 2.5" in warning
    assert all(word in warning for word in ("fewer epochs", "`dropout`", "`table_weight_decay`", "more data"))


def test_a_row_stands_beside_the_best_of_all_that_arrived_before_it():
    dice, leaders = random.Random(0), Leaders("nll")
    state, rows = SweepState(), []
    for number in range(200):
        rung, status = dice.randrange(3), dice.choice(["ok", "ok", "diverged"])
        row = {"trial": f"t{number}", "rung": rung, "rung_flops": 4**rung * 1e9, "status": status}
        row |= {"params": dice.randrange(9), "metrics": {"nll": dice.choice([None, *range(1, 40)])}}
        state.rungs.setdefault(rung, {})[row["trial"]] = row
        state.arrivals.append((row["trial"], rung))
        # Imported rows arrive unasked.
        if number % 3:
            before = Results(rows).bests("nll") if rows and Results(rows).metrics else {}
            assert leaders.beside(row, state) is before.get(row["rung_flops"])
        rows.append(row)


def test_a_last_step_beyond_the_limit_leaves_no_time():
    record = SimpleNamespace(path_flops=1.004e12, loss=5.0, loss_headline=math.nan, events_per_s=2e4, flops_per_s=1e9)
    assert step_words(record, 1e12, 1e11) == "C 1e12  loss 5.0000  20k events/s  1.0% of peak  0.0s left"


def test_the_live_line_says_that_the_machine_is_crowded_and_only_then(monkeypatch, capsys):
    monkeypatch.setattr(machine, "read_kernel", lambda file: "")
    for load, said in ((2.1, ""), (3.4, "  crowded: 3.4 threads for 2 cores")):
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 9.0, 9.0))
        with Display("train") as display:
            display.show("C 1e9", 0.5)
        assert capsys.readouterr().err == f"train: C 1e9{said} (50%)\n"


def test_a_container_looks_at_its_own_part_of_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "getloadavg", lambda: (200.0, 9.0, 9.0))
    of_the_machine = "crowded: 200.0 threads for 64 cores"
    assert crowding.crowding(tmp_path) == of_the_machine
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu.pressure").write_text("some avg10=1.00 avg60=72.40 avg300=0.00 total=9\n")
    assert crowding.crowding(tmp_path) == of_the_machine
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert crowding.crowding(tmp_path) == "crowded: threads wait 72% of the time for 1.5 cores"
    (tmp_path / "cpu.pressure").write_text("some avg10=99.00 avg60=12.40 avg300=0.00 total=9\n")
    assert crowding.crowding(tmp_path) == ""
    (tmp_path / "cpu.pressure").unlink()
    assert crowding.crowding(tmp_path) == of_the_machine
