"""What the writers leave is what TensorBoard reads back, also after kills, repeats and full disks."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from bfm.doors.events_file import EventFile, flops_step, stored_events
from bfm.doors.tensorboard import SweepWriter, TrialWriter
from bfm.files import Store
from bfm.sweep.ledger.state import SweepState
from bfm.training.records import StepRecord
from tests.report.planted import VALIDATION, planted_sweep, state_of

CONFIG = {"params": 1e5, "embedder_share": 0.02, "averaging": False, "depth": None, "shape": [1, 2]}
METRICS = ["nll", "recall@10"]


def record(step: int, phase: str = "trunk", growth: float = 1.0, **more: object) -> StepRecord:
    values = dict(
        step=step, stage=1, phase=phase, path_flops=int(1e9 * step * growth), events=900 * step, loss=9.0 - 0.01 * step,
        loss_headline=9.5, loss_basket=float("nan"), gates={"softmax": 0.75, "pointer": 0.25},
        learning_rate=1e-3, grad_norm=0.5, events_per_s=2e4, flops_per_s=3e10, elapsed_s=0.1 * step,
    )  # fmt: skip
    return StepRecord(**(values | more))


def rung_row(steps: int, rung: int = 0) -> dict:
    return {
        "kind": "rung", "status": "ok", "rung": rung, "steps": steps, "path_flops": steps * 10**9,
        "metrics": {"nll": 8.0, "recall@10": 0.1, "coverage@10": None}, "errors": {"nll": 0.02},
    }  # fmt: skip


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def steps_of(folder: Path, tag: str) -> list[int]:
    return [event.step for event in read(folder).Scalars(tag)]


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_trial_reads_back_against_steps_and_against_c(tmp_path):
    writer = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
    for step in range(1, 41):
        writer.step(record(step))
    for step in range(41, 51):
        writer.step(record(step, "cooldown"))
    writer.row(rung_row(100))
    writer.close()
    board = read(tmp_path)
    losses = board.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 41))
    assert losses[9].value == pytest.approx(8.9)
    assert [event.step for event in board.Scalars("train_cooldown/loss")] == list(range(41, 51))
    assert board.Scalars("loss_by_C/trunk")[0].step == flops_step(1e9) == 9000
    assert {event.value for event in board.Scalars("train_cooldown/gate_pointer")} == {0.25}
    assert "train/loss_basket" not in board.Tags()["scalars"], "steps without basket targets"
    for tag in (
        "train/loss_headline",
        "train/gate_softmax",
        "opt/lr",
        "opt/grad_norm",
        "perf/events_per_s",
        "perf/flops_per_s",
        "progress/events",
    ):
        assert len(board.Scalars(tag)) == 40
    assert [(event.step, event.value) for event in board.Scalars("val/nll")] == [(100, 8.0)]
    assert [event.step for event in board.Scalars("metrics_by_C/recall@10")] == [11000]
    assert board.Scalars("val_low/nll")[0].value == pytest.approx(7.96)
    assert "val/coverage@10" not in board.Tags()["scalars"]
    assert "val_low/recall@10" not in board.Tags()["scalars"]


def test_hparams_and_layout_are_there_from_the_start(tmp_path):
    TrialWriter(tmp_path, CONFIG, METRICS)
    contents = read(tmp_path).summary_metadata
    plugins = [metadata.plugin_data.plugin_name for metadata in contents.values()]
    assert plugins.count("hparams") == 3
    assert plugins.count("custom_scalars") == 1
    start = plugin_data_pb2.HParamsPluginData.FromString(
        contents["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert dict(start.hparams).keys() == {"params", "embedder_share", "averaging"}
    assert start.hparams["params"].number_value == 1e5
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        contents["_hparams_/experiment"].plugin_data.content
    ).experiment
    sizes = ["row/N", "row/s", "row/D", "row/C"]
    assert [info.name.tag for info in experiment.metric_infos] == [*sizes, "val/nll", "val/recall@10"]
    assert [info.name for info in experiment.hparam_infos] == ["params", "embedder_share", "averaging"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_and_resumed_trial_has_every_step_once(tmp_path):
    first = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
    for step in range(1, 31):
        first.step(record(step))
    first.row(rung_row(30))
    # The process dies here: nothing is closed. The next one goes on from a checkpoint at step 20.
    second = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
    for step in range(21, 51):
        second.step(record(step))
    second.row(rung_row(30))
    second.row(rung_row(50, rung=1))
    second.close()
    assert steps_of(tmp_path, "train/loss") == list(range(1, 51))
    places = steps_of(tmp_path, "loss_by_C/trunk")
    assert len(places) == len(set(places))
    assert steps_of(tmp_path, "val/nll") == [30, 50]
    sessions = [v for e in stored_events(Store(tmp_path)) for v in e.summary.value if v.tag.endswith("start_info")]
    assert len(sessions) == 1


def test_validations_stand_beside_floors_and_the_best_once_each(tmp_path):
    cooled = replace(VALIDATION, step=120, phase="cooldown", metrics={"nll": 8.5})
    for _ in range(2):
        writer = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
        for told in (record(99), VALIDATION, cooled):
            writer.take(told)
        writer.close()
    board = read(tmp_path)
    expected = {"nll": 8.69, "nll_floor": 9.24, "nll_best": 8.69, "recall@10_floor": 0.05, "epochs": 3.14}
    for name, value in expected.items():
        (event,) = board.Scalars(f"validation/{name}")
        assert (event.step, event.value) == (100, pytest.approx(value))
    assert [event.step for event in board.Scalars("loss_by_C/validation_nll")] == [flops_step(1.2e12)]
    assert [event.value for event in board.Scalars("validation_cooled/nll")] == [8.5]
    assert [event.step for event in board.Scalars("train/loss")] == [99]


def test_a_dropped_observer_leaves_its_last_step(tmp_path):
    observe = TrialWriter(tmp_path, CONFIG, METRICS, Clock()).step
    for step in range(1, 1001):
        observe(record(step))
    del observe
    assert steps_of(tmp_path, "train/loss")[-1] == 1000


def test_a_file_cut_short_is_read_to_its_last_whole_event(tmp_path):
    writer = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
    for step in range(1, 11):
        writer.step(record(step))
    writer.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    again = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
    for step in range(5, 15):
        again.step(record(step))
    again.close()
    assert steps_of(tmp_path, "train/loss") == list(range(1, 15))


def test_long_trials_write_few_points_but_the_last_of_each_phase(tmp_path):
    writer = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
    for step in range(1, 10_001):
        writer.step(record(step))
    writer.step(record(10_001, "cooldown"))
    writer.close()
    steps = steps_of(tmp_path, "train/loss")
    # Every step up to 50 (each grows C by more than 2 %), then log(10000 / 50) / log(1.02) = 268 points.
    assert 290 < len(steps) < 330
    assert steps[-1] == 10_000
    assert steps_of(tmp_path, "train_cooldown/loss") == [10_001]


def test_slow_steps_are_written_by_time(tmp_path):
    clock = Clock()
    writer = TrialWriter(tmp_path, CONFIG, METRICS, clock)
    for step in range(1, 101):
        clock.now_s += 4.0
        writer.step(record(step, path_flops=int(1e15 + step)))
    writer.close()
    # Every third step (12 s), and the last.
    assert steps_of(tmp_path, "train/loss") == [*range(1, 101, 3)]
    places = steps_of(tmp_path, "loss_by_C/trunk")
    assert places == [15000]


def test_a_week_of_slow_steps_is_some_hundred_points(tmp_path):
    clock = Clock()
    writer = TrialWriter(tmp_path, CONFIG, METRICS, clock)
    for step in range(1, 20_161):
        clock.now_s += 30.0
        writer.step(record(step, path_flops=int(1e18 + 1e13 * step)))
    writer.close()
    # Every step up to 50 of them, then log(week / 1500 s) / log(1.02).
    assert 200 < len(steps_of(tmp_path, "train/loss")) < 400


def test_what_a_sweep_is_about_stands_first(tmp_path):
    sweep = planted_sweep()
    board = SweepWriter(tmp_path / "_sweep", sweep["baselines"])
    board.update(sweep["state"])
    board.close()
    trial = TrialWriter(tmp_path / "t00000", CONFIG, METRICS, Clock())
    for told in (record(1), record(2, "cooldown"), VALIDATION):
        trial.take(told)
    trial.row(rung_row(100) | {"params": 1010, "embedder_share": 0.02, "events": 90_000})
    trial.close()
    boards = [read(tmp_path / name) for name in ("_sweep", "t00000")]
    groups = sorted({tag.partition("/")[0] for board in boards for tag in board.Tags()["scalars"]})
    assert groups[:4] == ["frontier", "frontier_by_spend", "loss_by_C", "metrics_by_C"]
    sizes = {tag: boards[1].Scalars(tag)[0].value for tag in ("row/N", "row/s", "row/D", "row/C")}
    assert sizes == pytest.approx({"row/N": 1010, "row/s": 0.02, "row/D": 90_000, "row/C": 1e11})
    layouts = [
        value for value in boards[0].summary_metadata.values() if value.plugin_data.plugin_name == "custom_scalars"
    ]
    assert len(layouts) == 1


def test_a_writer_that_costs_too_much_writes_less(tmp_path, monkeypatch):
    clock = Clock()
    writer = TrialWriter(tmp_path, CONFIG, METRICS, clock)
    scalars = EventFile.scalars

    def slow(self, step, values):
        clock.now_s += 0.05
        scalars(self, step, values)

    monkeypatch.setattr(EventFile, "scalars", slow)
    for step in range(1, 1001):
        clock.now_s += 0.01
        writer.step(record(step))
    writer.close()
    # 10 s of training allow 0.1 s of writing: one point costs that much.
    assert len(steps_of(tmp_path, "train/loss")) <= 4


def test_a_failed_trial_marks_its_session(tmp_path):
    writer = TrialWriter(tmp_path, CONFIG, METRICS)
    writer.row(rung_row(10) | {"status": "diverged", "metrics": {}, "errors": {}})
    writer.row({"kind": "probe", "steps": 5, "metrics": {"nll": 1.0}})
    writer.close()
    ends = [v for e in stored_events(Store(tmp_path)) for v in e.summary.value if v.tag.endswith("session_end_info")]
    last = plugin_data_pb2.HParamsPluginData.FromString(ends[-1].metadata.plugin_data.content)
    assert last.session_end_info.status == 2
    assert "val/nll" not in read(tmp_path).Tags()["scalars"]


def test_a_place_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        writer = TrialWriter(tmp_path / "file" / "logs", CONFIG, METRICS)
        for step in range(1, 20):
            writer.step(record(step))
        writer.row(rung_row(20))
        writer.close()
    assert [str(warning.message).startswith("TensorBoard is off") for warning in caught] == [True]


def test_a_disk_that_fills_up_costs_one_warning(tmp_path, monkeypatch):
    writer = TrialWriter(tmp_path, CONFIG, METRICS, Clock())
    writer.step(record(1))

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._file._writer, "write", full)
    with pytest.warns(UserWarning, match="No space left"):
        writer.step(record(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3, 20):
            writer.step(record(step))
        writer.close()


def test_the_sweep_reads_back_and_is_taken_up_again(tmp_path):
    sweep = planted_sweep()
    rows = sweep["rows"]
    writer = SweepWriter(tmp_path, sweep["baselines"])
    for count in range(1, len(rows)):
        writer.update(state_of(rows[:count], spent_flops=1e12, open_tasks={"a": None, "b": None}))
    again = SweepWriter(tmp_path, sweep["baselines"])
    for count in range(len(rows) - 3, len(rows) + 1):
        again.update(state_of(rows[:count], spent_flops=1.5e13))
    again.finish(rows)
    board = read(tmp_path)
    total = board.Scalars("spend/total")
    assert [event.step for event in total] == list(range(1, len(rows) + 1))
    assert total[-1].value == pytest.approx(1.5e13, rel=1e-6)
    assert {event.value for event in board.Scalars("occupancy/running")} == {0, 2}
    best = board.Scalars("frontier/nll/C=1.6e12")
    assert best[-1].value == pytest.approx(min(r["metrics"]["nll"] for r in rows if r["rung"] == 2), rel=1e-6)
    floor = board.Scalars("frontier/recall@10/floor=co-occurrence")
    value = sweep["baselines"]["co_occurrence"]["recall@10"]
    assert [event.value for event in floor] == pytest.approx([value] * len(total))
    values = [event.value for event in board.Scalars("frontier/recall@10/C=1e11")]
    assert values == sorted(values)
    assert board.Scalars("occupancy/C=4e11")[-1].value == 10
    assert board.Scalars("occupancy/failed")[-1].value == 2
    assert board.Scalars("spend/C=1e11")[-1].value == pytest.approx(2.4e12, rel=0.01)
    assert board.Scalars("frontier_by_spend/nll/C=1e11")
    assert b"at most" in board.Tensors("frontier/text_summary")[0].tensor_proto.string_val[0]


def test_a_long_sweep_is_looked_at_whole_only_now_and_then(tmp_path):
    row, looks, clock = planted_sweep()["rows"][0], [], Clock()
    writer = SweepWriter(tmp_path, {}, clock)

    class Growing(SweepState):
        def all_rows(self):
            looks.append(len(self.arrivals))
            clock.now_s += 0.6
            return super().all_rows()

    state = Growing(rungs={0: {}})
    for number in range(3000):
        clock.now_s += 0.1
        state.rungs[0][str(number)] = {**row, "trial": str(number)}
        state.arrivals.append((str(number), 0))
        writer.update(state)
    # Every result up to 50, then log(3000 / 50) / log(1.02) = 207, and those that a hundredth of the time allows.
    assert len(looks) < 300
    writer.close()
    assert looks[-1] == 3000


def test_on_an_object_store_a_running_sweep_is_seen_in_few_requests(s3_server, s3):
    clock = Clock()
    writer = TrialWriter(s3 + "/logs", CONFIG, METRICS, clock)
    with s3_server.counted() as requests:
        for step in range(1, 401):
            clock.now_s += 1.0
            writer.step(record(step))
            if step == 200:
                seen = [value.tag for event in stored_events(Store(s3 + "/logs")) for value in event.summary.value]
                assert seen.count("train/loss") > 100
                assert not requests
    assert requests["PUT"] == 6
    s3_server.faults[:] = ["503"]
    clock.now_s += 61.0
    writer.step(record(500))
    writer.step(record(501))
    writer.close()
    again = TrialWriter(s3 + "/logs", CONFIG, METRICS, clock)
    again.step(record(501))
    again.step(record(502))
    again.close()
    steps = [
        event.step
        for event in stored_events(Store(s3 + "/logs"))
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert sorted(set(steps)) == steps
    assert steps[-3:] == [500, 501, 502]
    assert "train/loss" in [v.tag for e in stored_events(Store(s3 + "/logs")) for v in e.summary.value]
