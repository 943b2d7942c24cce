"""Validation on the way changes no weight, keeps the best ones for good, and says when a model memorises."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bfm.errors import UserError
from bfm.files import Store
from bfm.ranking.evaluate import evaluate
from bfm.ranking.metrics import QueryScores, summarise
from bfm.training import task as task_module
from bfm.training.checkpoint import load_checkpoint, load_model
from bfm.training.data import TrainingData
from bfm.training.loop import Counters, Trainer
from bfm.training.records import StepRecord, Validation
from bfm.training.rung import run_rung
from bfm.training.single import evaluate_checkpoint, train_single
from bfm.training.task import RungTask
from bfm.training.watch import Watch
from tests.helpers import make_shards
from tests.training.common import CPU, STAGE_1

FLOPS, QUERIES = 2.5e8, 100
BEST = "trials/run/checkpoints/best"
PLAIN = dataclasses.replace(STAGE_1, averaging=False)
TASK = RungTask("run", "run", 0, FLOPS, PLAIN, seed=3, micro_groups=4, evaluation_queries=QUERIES, validations=4)


@pytest.fixture(scope="module")
def watched(toy_shards, tmp_path_factory):
    store, seen = Store(tmp_path_factory.mktemp("watched")), []
    return store, run_rung(TASK, toy_shards, CPU, store, seen.append), seen


def test_validations_stand_evenly_on_the_trunk_and_at_the_cooled_end(watched):
    _, row, seen = watched
    looks = [record for record in seen if isinstance(record, Validation)]
    assert [dataclasses.asdict(look) for look in looks] == json.loads(json.dumps(row["validations"]))
    assert [look.phase for look in looks] == ["trunk"] * 4 + ["cooldown"]
    wanted = [0.2 * FLOPS, 0.4 * FLOPS, 0.6 * FLOPS, 0.8 * FLOPS, FLOPS]
    for look, flops in zip(looks, wanted, strict=True):
        assert 0.98 * flops < look.path_flops <= flops
        assert look.metrics.keys() == {"nll", "recall@10", "ndcg@10"}
        assert look.floors.keys() == {"popularity", "co_occurrence", "personal"}
        before = [record.loss for record in seen if isinstance(record, StepRecord) and record.step <= look.step]
        assert look.train_loss == pytest.approx(np.mean(before[-50:]))
    assert looks[-1].metrics["nll"] == row["metrics"]["nll"], "the row is of the same queries here"
    assert looks[-1].epochs == pytest.approx(row["epochs"])


def test_looking_changes_neither_weights_nor_row(watched, toy_shards, tmp_path):
    store, row, _ = watched
    alone = run_rung(dataclasses.replace(TASK, validations=0), toy_shards, CPU, Store(tmp_path))
    assert alone.keys() == row.keys() - {"validations", "best", "best_model"}
    assert alone["metrics"] == row["metrics"]
    weights = [load_checkpoint(where, alone["model"]).state.weight for where in (Store(tmp_path), store)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not Store(tmp_path).exists(f"{BEST}/meta.json")


def test_the_best_is_a_checkpoint_that_scores_what_was_said(watched, toy_shards):
    store, row, _ = watched
    assert row["best_model"] == BEST
    assert row["best"]["metrics"]["nll"] == min(look["metrics"]["nll"] for look in row["validations"])
    again = evaluate_checkpoint(f"{store.uri}/{BEST}", str(toy_shards.path), "validation", QUERIES)
    assert again["metrics"]["nll"] == pytest.approx(row["best"]["metrics"]["nll"], rel=1e-6)
    for name, values in row["best"]["floors"].items():
        assert values.items() <= again["baselines"][name].items()


def test_the_cooled_end_is_judged_on_the_queries_of_the_way(toy_shards, tmp_path, monkeypatch):
    """The row scores more of them."""
    monkeypatch.setattr(task_module, "PROBE_QUERIES", 40)
    store = Store(tmp_path)
    row = run_rung(dataclasses.replace(TASK, validations=1), toy_shards, CPU, store)
    model, _ = load_model(f"{store.uri}/{row['model']}", toy_shards)
    data = TrainingData.of(toy_shards)
    first = summarise(evaluate(model, toy_shards, data.protocol, "validation", PLAIN.window, queries=40))
    for metric, value in row["validations"][-1]["metrics"].items():
        assert value == pytest.approx(first.metrics[metric], rel=1e-6)
        assert value != row["metrics"][metric]


class Run:
    """A run that never trains: validations of planted per-query nll, in the storage of earlier ones."""

    def __init__(self, shards, directory, config=PLAIN, queries=QUERIES) -> None:
        task = dataclasses.replace(TASK, config=config, evaluation_queries=queries)
        self.data, self.store = TrainingData.of(shards), Store(directory)
        self.trainer = Trainer(config, TASK.seed, self.data, CPU)
        self.watch = Watch(task, self.store, self.data)

    def see(
        self, flops: int, nll: float, train_loss: float, *, spread=0.1, queries=QUERIES, epochs=3.0, phase="trunk"
    ) -> Validation:
        rng = np.random.default_rng(flops)
        values = {name: np.full(queries, 0.5) for name in ("recall@10", "ndcg@10")}
        noise_Q = rng.normal(size=queries)
        values["nll"] = nll + spread * (noise_Q - noise_Q.mean())
        rows = np.arange(queries)
        scores = QueryScores(rows, rows // 2, np.zeros(queries, bool), values, {})
        standing = SimpleNamespace(
            counters=Counters(
                path_flops=flops, step=flops, phase=phase, events=round(epochs * self.trainer.order.targets_per_epoch)
            ),
            order=self.trainer.order,
            factory=CPU,
            recent_loss=train_loss,
            meta=self.trainer.meta,
        )
        return self.watch.see(standing, scores, {"mark": torch.tensor([float(flops)])})

    def kept(self) -> float:
        return float(load_checkpoint(self.store, BEST).state.weight["mark"])


def test_a_worse_validation_never_replaces_the_best_not_even_of_a_later_call(toy_shards, tmp_path):
    first = Run(toy_shards, tmp_path)
    assert [first.see(c, nll, 7.0).is_best for c, nll in ((1, 9.0), (2, 8.0), (3, 8.5))] == [True, True, False]
    assert first.kept() == 2
    later = Run(toy_shards, tmp_path)
    worse = later.see(4, 8.2, 7.0)
    assert (worse.is_best, worse.best_flops, worse.best_nll, later.kept()) == (False, 2, pytest.approx(8.0), 2)
    assert later.watch.as_dict()["best"]["path_flops"] == 2
    assert later.see(5, 7.9, 7.0).is_best
    assert later.kept() == 5


def test_calls_with_other_numbers_of_queries_compare_the_queries_of_both(toy_shards, tmp_path):
    Run(toy_shards, tmp_path, queries=50).see(1, 9.0, 7.0, spread=0.0, queries=50)
    both = Run(toy_shards, tmp_path).see(2, 9.5, 7.0, spread=0.0)
    assert (both.is_best, both.rise) == (False, pytest.approx(0.5))


def test_memorising_is_a_rise_beyond_chance_while_the_training_loss_falls(toy_shards, tmp_path):
    run = Run(toy_shards, tmp_path)
    run.see(1, 8.69, 7.0)
    once = run.see(2, 8.82, 6.0)
    assert once.risen
    assert (once.rise, once.loss_fall) == (pytest.approx(0.13), pytest.approx(1.0))
    assert once.rise > 2 * once.rise_error
    assert not once.memorises, "one look may be a wobble"
    assert run.see(3, 12.24, 3.0).memorises, "twice running"
    assert not run.see(4, 8.82, 7.5).risen, "the training loss rose as well"
    assert not run.see(5, 8.82, 6.0, spread=2.0).risen, "chance"
    assert not run.see(6, 8.82, 6.0, epochs=0.9).risen, "nothing was seen twice"
    assert not run.see(7, 8.6, 5.0).risen, "better"
    assert run.see(8, 9.0, 4.0, phase="cooldown").memorises, "nothing comes after the cooled end"


def test_the_best_of_another_run_is_refused(toy_shards, tmp_path):
    Run(toy_shards, tmp_path).see(1, 9.0, 7.0)
    with pytest.raises(UserError, match="another run: dropout is"):
        Run(toy_shards, tmp_path, config=dataclasses.replace(PLAIN, dropout=0.2))


def test_there_must_be_something_to_validate_on(tmp_path):
    empty = make_shards(tmp_path / "shards", queries=0)
    options = {"queries": None, "scaling": {"micro_groups": 1}}
    with pytest.raises(UserError, match="no headline query"):
        train_single(PLAIN, 0, str(empty.path), str(tmp_path / "run"), flops=FLOPS, validations=2, **options)
    group = {"run_group": lambda *_: pytest.fail("workers were started")}
    with pytest.raises(UserError, match="no headline query"):
        train_single(PLAIN, 0, str(empty.path), str(tmp_path), flops=FLOPS, validations=2, **options, **group)
