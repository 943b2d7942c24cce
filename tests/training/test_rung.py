"""A row at C is a function of (trunk, C), whichever way it was reached; failures become rows, not crashes."""

import dataclasses
import json
import math

import pytest
import torch

from bfm.errors import InfeasibleError, UserError
from bfm.files import Store
from bfm.laws.frontier import unpaired
from bfm.ranking.metrics import summarise
from bfm.ranking.paired import Pairing, read_scores
from bfm.training import checkpoint
from bfm.training.checkpoint import load_checkpoint, load_model
from bfm.training.loop import Trainer
from bfm.training.row import code_version
from bfm.training.rung import run_rung
from bfm.training.task import RungTask
from tests.training.common import CPU, STAGE_1, STAGE_2

C0, C1 = 2.5e8, 4e8
ROW_KEYS = {
    *("trial", "rung", "rung_flops", "seed", "config", "kind", "status", "checkpoint", "model", "scores"),
    *("checkpoint_sha256", "checkpoint_bytes", "model_bytes"),
    *("params", "embedder_share", "embedder_params", "contextualizer_params", "stem_params", "table_params", "shape"),
    *("path_flops", "task_flops", "eval_flops", "hardware_flops", "useful_attention_flops", "undeduplicated_flops"),
    *("steps", "events", "unique_events", "epochs", "batch_events", "groups", "metrics", "errors"),
    *("code_version", "flops_version", "protocol_hash", "shards_hash"),
    *("engine", "workers", "zero_stage", "device", "dtype", "micro_groups", "softmax", "threads"),
    *("train_s", "eval_s", "warm_start_s"),
}
ASKED = {
    "trial",
    "checkpoint",
    "checkpoint_sha256",
    "model",
    "scores",
    "task_flops",
    "train_s",
    "eval_s",
    "warm_start_s",
}


def task(trial="a", rung=0, flops=C0, config=STAGE_1, **changes):
    return RungTask(f"{trial}-{rung}", trial, rung, flops, config, seed=3, micro_groups=4, **changes)


@pytest.fixture(scope="module", params=[STAGE_1, STAGE_2], ids=["stage1", "stage2"])
def promoted(request, toy_shards, tmp_path_factory):
    """Rows of a trial at two rungs, reached by promotion, with a probe on the way to the second."""
    store = Store(tmp_path_factory.mktemp("sweep"))
    low = run_rung(task(config=request.param), toy_shards, CPU, store)
    high_task = task(rung=1, flops=C1, config=request.param, resume_from=low["checkpoint"], probes=(3e8,))
    return request.param, store, low, run_rung(high_task, toy_shards, CPU, store)


def test_direct_row_equals_promoted_row(promoted, toy_shards):
    config, store, low, high = promoted
    direct = run_rung(task("b", 1, C1, config, probes=(3e8,)), toy_shards, CPU, store)
    assert {k: v for k, v in direct.items() if k not in {*ASKED, "probes"}} == {
        k: v for k, v in high.items() if k not in {*ASKED, "probes"}
    }
    seals = [row["scores"].rsplit("-", 1)[-1] for row in (direct, high)]
    assert seals[0] == seals[1], "equal scores of queries have equal names"
    assert direct["probes"][0]["metrics"] == high["probes"][0]["metrics"]
    weights = [load_checkpoint(store, row["model"]).state.weight for row in (direct, high)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    trunk_flops = load_checkpoint(store, low["checkpoint"]).meta["counters"]["path_flops"]
    assert direct["task_flops"] == direct["path_flops"]
    assert high["task_flops"] == direct["path_flops"] - trunk_flops


def test_row_is_complete_and_met_its_rung(promoted):
    _, _, low, high = promoted
    for row, flops in ((low, C0), (high, C1)):
        told = json.loads(json.dumps(row))
        assert set(told) == ROW_KEYS | {"probes"}
        assert all(set(probe) == ROW_KEYS for probe in told["probes"])
        assert row["status"] == "ok"
        assert 0.99 * flops <= row["path_flops"] <= flops
        assert row["steps"] >= 100
        assert row["metrics"].keys() >= {"nll", "recall@10", "ndcg@10", "mrr@10", "coverage@10", "loss_sampled"}
        assert row["epochs"] == pytest.approx(row["events"] / row["unique_events"])
    probe = high["probes"][0]
    assert probe["kind"] == "probe"
    assert probe["path_flops"] <= 3e8 < probe["path_flops"] + 2e8 / 100 * 2
    assert probe["checkpoint"] is None


def test_model_can_be_loaded_and_has_learned(promoted, toy_shards):
    _, store, low, high = promoted
    model, _ = load_model(f"{store.uri}/{high['model']}", toy_shards)
    assert not model.training
    assert low["metrics"]["nll"] < math.log(toy_shards.num_catalogue)


def test_rows_leave_the_scores_that_pair_them(promoted):
    _, store, low, high = promoted
    scores = read_scores(store, high["scores"])
    evaluation = summarise(scores)
    assert len(scores.query_Q) > 50
    for name, error in evaluation.errors.items():
        assert evaluation.metrics[name] == pytest.approx(high["metrics"][name], rel=1e-5)
        assert error == pytest.approx(high["errors"][name], rel=1e-5)
    gap = Pairing(store)(high, low, "nll")
    assert gap.paired
    assert gap.value == pytest.approx(high["metrics"]["nll"] - low["metrics"]["nll"], rel=1e-4)
    assert gap.error < 0.5 * unpaired(high, low, "nll").error
    assert high["probes"][0]["scores"] is None


def test_rung_behind_the_checkpoint_is_refused(promoted, toy_shards):
    config, store, _, high = promoted
    with pytest.raises(UserError, match="past the end of the trunk"):
        run_rung(task(config=config, resume_from=high["checkpoint"]), toy_shards, CPU, store)


def test_cooled_checkpoint_is_no_trunk(promoted, toy_shards):
    config, store, low, _ = promoted
    with pytest.raises(UserError, match="cooldown checkpoint"):
        run_rung(task(rung=1, flops=C1, config=config, resume_from=low["model"]), toy_shards, CPU, store)


def test_too_few_steps_are_refused_before_training(toy_shards, tmp_path):
    seen = []
    with pytest.raises(InfeasibleError, match="at least 100"):
        run_rung(task(flops=5e7), toy_shards, CPU, Store(tmp_path), seen.append)
    assert seen == []


def test_probes_need_averaging(toy_shards, tmp_path):
    config = dataclasses.replace(STAGE_1, averaging=False)
    with pytest.raises(UserError, match="averaged weights"):
        run_rung(task(config=config, probes=(1e8,)), toy_shards, CPU, Store(tmp_path))


def _fail_at(monkeypatch, step, action):
    forward = Trainer._forward_backward

    def broken(self, batches):
        return action() if self.counters.step == step else forward(self, batches)

    monkeypatch.setattr(Trainer, "_forward_backward", broken)


def test_divergence_is_a_row_that_counts_what_it_spent(toy_shards, tmp_path, monkeypatch):
    _fail_at(monkeypatch, 20, lambda: (torch.tensor(math.nan), torch.zeros(2, 5)))
    row = run_rung(task(), toy_shards, CPU, Store(tmp_path))
    assert (row["status"], row["metrics"], row["checkpoint"], row["steps"]) == ("diverged", {}, None, 21)
    # It is read beside the next step, which is paid for as well.
    assert 0 < row["path_flops"] < row["task_flops"] < 1.1 * row["path_flops"] < C0


def test_out_of_memory_is_a_row(toy_shards, tmp_path, monkeypatch):
    def no_memory():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    _fail_at(monkeypatch, 20, no_memory)
    row = run_rung(task(), toy_shards, CPU, Store(tmp_path))
    assert (row["status"], row["metrics"], row["model"]) == ("oom", {}, None)


def test_a_group_that_ran_out_of_memory_tells_so_when_it_restarts(toy_shards, tmp_path, monkeypatch):
    """With several workers the rank that cannot allocate marks the task and dies; the next attempt answers."""

    def no_memory():
        raise MemoryError

    _fail_at(monkeypatch, 20, no_memory)
    monkeypatch.setattr(type(CPU), "world_size", 2)
    with pytest.raises(MemoryError):
        run_rung(task(), toy_shards, CPU, Store(tmp_path))
    monkeypatch.undo()
    assert run_rung(task(), toy_shards, CPU, Store(tmp_path))["status"] == "oom"
    other = dataclasses.replace(task(), task_id="another try")
    assert run_rung(other, toy_shards, CPU, Store(tmp_path))["status"] == "ok"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", [1, 40, 105])
def test_killed_task_goes_on_and_equals_the_unbroken_one(toy_shards, tmp_path, kill_at):
    """In-rung checkpoints at every step; the kill comes in the trunk or in the cooldown branch (step 105)."""
    curve, broken = [], []
    whole = run_rung(task("whole"), toy_shards, CPU, Store(tmp_path), curve.append)

    def kill(record):
        broken.append(record)
        if record.step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        run_rung(task("cut"), toy_shards, CPU, Store(tmp_path), kill, save_every_s=0.0)
    after = []
    row = run_rung(task("cut"), toy_shards, CPU, Store(tmp_path), after.append, save_every_s=0.0)
    assert after[0].step == kill_at, "the checkpoint before the killed step"
    assert [r.loss for r in broken[: kill_at - 1] + after] == [r.loss for r in curve]
    same = {"path_flops", "metrics", "errors", "events", "steps", "groups"}
    assert {key: row[key] for key in same} == {key: whole[key] for key in same}
    redone_flops = row["task_flops"] - whole["task_flops"]
    assert redone_flops == broken[-1].path_flops - (broken[-2].path_flops if kill_at > 1 else 0)
    assert not Store(tmp_path).exists(task("cut").name("progress") + "/meta.json")


def test_a_checkpoint_past_the_trunk_of_a_smaller_budget_is_passed_over(toy_shards, tmp_path):
    """One run trained to ever other budgets: the trunk that stands below is gone on from."""
    store = Store(tmp_path)
    first = run_rung(task("run", flops=C0), toy_shards, CPU, store)

    def kill(record):
        if record.path_flops > 0.9 * 0.8 * 2 * C0:
            raise Killed

    larger = task("run", flops=2 * C0, resume_from=first["checkpoint"])
    with pytest.raises(Killed):
        run_rung(larger, toy_shards, CPU, store, kill, save_every_s=0.0)
    seen = []
    between = task("run", flops=1.2 * C0, resume_from=first["checkpoint"])
    assert run_rung(between, toy_shards, CPU, store, seen.append)["status"] == "ok"
    assert seen[0].path_flops < 1.2 * C0


@pytest.mark.parametrize("pattern", ["meta.json", "state-*.pt"])
def test_a_damaged_checkpoint_inside_the_rung_is_passed_over(toy_shards, tmp_path, pattern):
    def kill(record):
        if record.step == 40:
            raise Killed

    with pytest.raises(Killed):
        run_rung(task("cut"), toy_shards, CPU, Store(tmp_path), kill, save_every_s=0.0)
    (damaged,) = (tmp_path / task("cut").name("progress")).glob(pattern)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    after = []
    assert run_rung(task("cut"), toy_shards, CPU, Store(tmp_path), after.append)["status"] == "ok"
    assert after[0].step == 1


def test_sweep_task_is_understood():
    values = {
        "task_id": "t1",
        "trial": "x",
        "rung": 2,
        "rung_flops": 100,
        "config": {"params": 1e4},
        "seed": 5,
        "resume_from": None,
        "from_rung": None,
        "reserved_flops": 120,
        "scaling": {"engine": "zero", "workers": 2, "zero_stage": 1, "cpus": 0.5, "gpus": 0, "micro_groups": 2}
        | {"softmax": "two_pass"},
        "probes": [10, 20],
        "evaluation_queries": 50,
    }
    task = RungTask.from_task(values)
    assert (task.probes, task.micro_groups, task.evaluation_queries) == ((10.0, 20.0), 2, 50)
    assert task.softmax == "two_pass"
    assert task.config.params == 1e4


def test_code_version_is_stable():
    assert code_version() == code_version()
    assert code_version().startswith("0.1.0+")


def test_a_model_of_another_version_of_the_objective_is_refused(toy_shards, tmp_path, monkeypatch):
    row = run_rung(task("old"), toy_shards, CPU, Store(tmp_path))
    monkeypatch.setattr(checkpoint, "FLOPS_VERSION", checkpoint.FLOPS_VERSION + 1)
    with pytest.raises(UserError, match=r"trained by version \d of the objective"):
        load_model(str(tmp_path / row["model"]), toy_shards)
