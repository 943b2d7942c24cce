"""`bfm recipe` as a user types it: on a planted ledger over toy shards, and on a sweep that was really trained."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from bfm.events.protocol import Protocol
from bfm.files import Store
from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, read_state
from bfm.sweep.space.costs import Costs
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.spec import from_dict
from bfm.training.config import TrainConfig
from bfm.training.engine import EngineFactory
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.helpers import make_shards
from tests.sweep.recipe.planted_sizes import row
from tests.sweep.serial import run_serial


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A small sweep of four sizes on three rungs, ready to be executed."""

    spec: SweepSpec
    costs: Costs
    protocol_hash: str

    @classmethod
    def over(cls, shards) -> Sweep:
        parameters = {
            "params": {"values": [2000, 2500, 3200, 4000]},
            "window": {"value": 4},
            "group_windows": {"value": 2},
        }
        parameters |= {"d_item": {"value": 8}, "table_width": {"value": 4}, "embedder_share": {"value": 0.1}}
        parameters |= {"groups_per_step": {"value": 2}, "warmup_events": {"value": 500}}
        spec = from_dict(
            {
                "name": "tiny",
                "metric": {"name": "nll"},
                "method": "grid",
                "parameters": parameters,
                "budget": {"ladder_flops": [6e7, 8e7, 1e8], "total_flops": 1e9, "events_per_param": [0, 1e6]},
                "scheduler": {"type": "grid"},
                "data": {"shards": str(shards.path), "evaluation_queries": 50},
            }
        )
        protocol = Protocol.load(shards)
        return cls(spec, Costs.on(shards, protocol, spec.data.evaluation_queries), protocol.hash)

    def run(self, folder, execute):
        store = Store(folder / "tiny")
        driver = SweepDriver.start(FeasibleSet(self.spec, self.costs), Ledger(store, Lease.acquire(store)))
        run_serial(driver, lambda task: execute(task, store))
        driver.close()
        return folder / "tiny"

    def planted(self, task, store):
        """The row of a task without training."""
        del store
        cost = self.costs.of(TrainConfig.from_dict(task.config))
        events = cost.events(task.rung_flops)
        value = 3.0 + 20 / cost.params**0.5 + 20 / events**0.5
        made = row(task.rung, 0, cost.params, value, flops=float(task.rung_flops), protocol_hash=self.protocol_hash)
        unique = min(events, cost.epoch_events)
        asked = {name: getattr(task, name) for name in ("trial", "rung", "rung_flops", "seed", "config")}
        asked |= {"events": events, "unique_events": unique, "batch_events": cost.step_events, "embedder_share": 0.1}
        spent = {"task_flops": task.reserved_flops, "eval_flops": 0, "checkpoint": f"{task.trial}-{task.rung}"}
        return {**made, **asked, **spent}


@pytest.fixture
def swept(tmp_path, toy_shards):
    """The folder of a finished sweep with planted rows."""
    sweep = Sweep.over(toy_shards)
    return sweep.run(tmp_path / "storage", sweep.planted)


@pytest.mark.slow
def test_foretold_trained_compared_and_written_down(bfm, tmp_path, toy_shards):
    def execute(task, store):
        return run_rung(RungTask.from_task(dataclasses.asdict(task)), toy_shards, EngineFactory(), store)

    swept = Sweep.over(toy_shards).run(tmp_path, execute)
    code, out, err = bfm("recipe", swept, "--flops", "1.2e8", "--json")
    assert code == 0, err
    recipe = json.loads(out)
    assert recipe["check"] is None
    code, out, err = bfm("recipe", swept, "--flops", "1.2e8", "--check", "--json")
    assert code == 0, err
    checked = json.loads(out)
    assert checked["config"] == recipe["config"]
    check = checked["check"]
    assert check["params"] == recipe["params"]["estimate"]
    assert check["path_flops"] == pytest.approx(1.2e8, rel=0.01)
    assert check["events"] == pytest.approx(recipe["events"], rel=0.1)
    low, high = recipe["predicted"]["low"], recipe["predicted"]["high"]
    assert check["inside"] == (low <= check["measured"] <= high)
    assert json.loads((swept / "report" / "recipe.json").read_text()) == checked
    assert read_state(Store(swept)).checks == [check]
    code, out, err = bfm("recipe", swept, "--flops", "1.2e8", "--check", "--json")
    assert json.loads(out)["check"] == check, "a check that stands is not trained again"
    assert read_state(Store(swept)).checks == [check]
    code, out, err = bfm("recipe", swept, "--flops", "1.2e8", "--json")
    assert json.loads(out) == checked, "what was checked stays checked"
    assert json.loads((swept / "report" / "recipe.json").read_text()) == checked
    code, out, _ = bfm("status", swept)
    assert "of 1 measured values inside" in out
    code, out, err = bfm("report", swept)
    assert code == 0, err
    assert "1 measured values inside" in (swept / "report" / "index.html").read_text()


def test_the_text_holds_a_configuration_that_train_takes(bfm, swept):
    code, out, err = bfm("recipe", swept, "--flops", "1.1e8", "--metric", "recall@10")
    assert code == 0, err
    assert "to be best in recall@10" in out
    shown = TrainConfig.from_dict(yaml.safe_load(out.split("# for `bfm train`\n")[1]))
    _, out, _ = bfm("recipe", swept, "--flops", "1.1e8", "--metric", "recall@10", "--json")
    assert shown == TrainConfig.from_dict(json.loads(out)["config"])


def test_a_study_is_read_by_its_sweeps(bfm, swept):
    study = swept.parent / "study.yaml"
    study.write_text(yaml.safe_dump({"sweeps": ["tiny", "later"]}))
    code, out, err = bfm("recipe", swept.parent, "--flops", "1.2e8", "--json")
    assert code == 0, err
    recipe = json.loads(out)
    assert recipe["rests_on"]["sizes"]["sweep"] == str(swept.parent)
    assert "without rows so far: later" in recipe["notes"]
    assert (swept.parent / "report" / "recipe.json").exists()
    study.write_text(yaml.safe_dump({"sweeps": "tiny"}))
    code, _, err = bfm("recipe", swept.parent, "--flops", "1.2e8")
    assert (code, err.count("\n")) == (2, 1)
    assert "study.yaml: sweeps: is no list of folders" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("NOWHERE", "--flops", "1.2e8"), "there is no sweep here"),
        (("SWEPT", "--flops", "1e6"), "below the lowest rung"),
        (("SWEPT", "--flops", "lots"), "--flops: 'lots'"),
        (("SWEPT", "--flops", "1.2e8", "--metric", "mrr@99"), "no rung row has mrr@99"),
        (("SWEPT", "--flops", "1.2e8", "--shards", "NOWHERE"), "--shards"),
        (("SWEPT", "--flops", "1.2e8", "--shards", "OTHER", "--check"), "is not that of the sweep's rows"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(bfm, swept, tmp_path, arguments, words):
    places = {"NOWHERE": tmp_path / "nowhere", "SWEPT": swept, "OTHER": tmp_path / "other"}
    if "OTHER" in arguments:
        make_shards(tmp_path / "other", seed=1)
    code, out, err = bfm("recipe", *(places.get(argument, argument) for argument in arguments))
    lines = [line for line in err.splitlines() if line.startswith("bfm: ")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert words in lines[0]


def test_a_check_waits_for_no_one(bfm, swept):
    lease = Lease.acquire(Store(swept), heartbeat_s=None)
    try:
        code, _, err = bfm("recipe", swept, "--flops", "1.3e8", "--check")
    finally:
        lease.release()
    assert code == 2
    assert "another sweep is running here" in err
