"""Runs that were trained elsewhere, as rows of a sweep: a table in, one ledger record out.

Enters: a table (see bfm.laws.tables) with a column per free parameter, `flops` (C), the selecting metric, and
optionally `seed`, `config_id`, `protocol_hash` and further metrics. Leaves: rung rows of trials x00000, x00001, ...
that cost nothing and have no checkpoint, and the counted reasons of the runs that are no use. Where the table does not
say by which protocol they were scored, that it was the sweep's is the user's word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfm.errors import UserError
from bfm.files import canonical_json
from bfm.laws.tables import ids_of, read_table
from bfm.model.flops import FLOPS_VERSION
from bfm.sweep.ledger.state import IMPORT, Record, SweepState
from bfm.sweep.space.metric import METRICS
from bfm.sweep.space.parameters import Parameter
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.space import FeasibleSet, Rejection


@dataclass(frozen=True)
class Run:
    """One row of the table that can be used."""

    config: dict[str, Any]
    params: int
    embedder_share: float
    seed: int
    config_id: str | None
    rung: int
    flops: int
    metrics: dict[str, float]

    @property
    def trial_key(self) -> tuple[bytes, int, str | None]:
        """Rows with equal keys are of one trial."""
        return canonical_json(self.config), self.seed, self.config_id


@dataclass(frozen=True)
class RunTable:
    """A table, judged."""

    file: str
    runs: tuple[Run, ...]
    left_out: dict[str, int]
    """Reason -> rows."""
    told: tuple[str, ...]
    """How the file was understood, where that is not as usual."""


def read_runs(path: str | Path, spec: SweepSpec, feasible: FeasibleSet, protocol_hash: str | None = None) -> RunTable:
    """Judge every row. Raises UserError for a table that lacks a column or has no row of use.

    `protocol_hash` is the sweep's; runs that name another one are left out.
    """
    names = [parameter.name for parameter in spec.free_parameters]
    told: list[str] = []
    table = read_table(path, [*names, "flops", spec.metric.name], say=told.append)
    runs: list[Run] = []
    left_out: Counter[str] = Counter()
    if "config_id" in table.column_names:
        ids = ids_of(table, "config_id")
        table = table.set_column(table.column_names.index("config_id"), "config_id", ids)
    for values in table.to_pylist():
        # An empty cell of a column of texts is an empty text.
        run = _of_another(values, protocol_hash) or _judge(values, spec, feasible)
        if isinstance(run, Run):
            runs.append(run)
        else:
            left_out[run] += 1
    if not runs:
        (reason, count), *_ = left_out.most_common(1)
        raise UserError(
            f"none of its {table.num_rows} runs is of use; {count}: {reason}",
            file=str(path),
            key="--import",
            fix="compare it with the ladder and the space",
        )
    return RunTable(Path(path).name, tuple(runs), dict(left_out.most_common()), tuple(told))


def import_record(state: SweepState, table: RunTable, spec: SweepSpec) -> Record:
    """What the ledger does not have yet of a table; its `rows` may be empty."""
    names: dict[tuple[bytes, int, str | None], str] = {}
    trained: set[tuple[bytes, int, int]] = set()
    for trial in state.trials.values():
        config = canonical_json(trial.config)
        if trial.source == IMPORT:
            names[config, trial.seed, next(iter(trial.rows.values()))["config_id"]] = trial.trial
        else:
            trained |= {(config, trial.seed, rung) for rung in trial.rows}
    taken = {(name, rung) for name in names.values() for rung in state.trials[name].rows}
    count = sum(trial.source == IMPORT for trial in state.trials.values())
    trials: list[Record] = []
    rows: list[Record] = []
    for run in table.runs:
        config, seed, _ = run.trial_key
        name = names.get(run.trial_key, f"x{count + len(trials):05d}")
        if (name, run.rung) in taken or (config, seed, run.rung) in trained:
            continue
        if run.trial_key not in names:
            names[run.trial_key] = name
            trials.append({"trial": name, "config": run.config, "seed": run.seed, "params": run.params})
        taken.add((name, run.rung))
        rows.append(_row(name, run, spec))
    known = len(table.runs) - len(rows)
    return {
        "kind": "imported",
        "file": table.file,
        "trials": trials,
        "rows": rows,
        "known": known,
        "left_out": table.left_out,
    }


def _of_another(values: Mapping[str, Any], protocol_hash: str | None) -> str | None:
    """Why a run cannot be compared with those of the sweep; None where it says nothing against it."""
    if protocol_hash and values.get("protocol_hash") and values["protocol_hash"] != protocol_hash:
        return "scored by another protocol"
    # A column of texts has "5", one with gaps 5.0.
    if values.get("flops_version") and values["flops_version"] not in (FLOPS_VERSION, str(FLOPS_VERSION)):
        return "of another version of the objective and of C"
    return None


def _judge(values: Mapping[str, Any], spec: SweepSpec, feasible: FeasibleSet) -> Run | str:
    """A run, or why it is of no use."""
    numbers = {name: _number(values.get(name)) for name in ("flops", *METRICS)}
    flops, value = numbers.pop("flops"), numbers[spec.metric.name]
    if flops is None or flops <= 0:
        return "flops is no number above 0"
    if value is None:
        return f"{spec.metric.name} is no finite number"
    budget = spec.budget
    near = [rung for rung, c in enumerate(budget.ladder_flops) if abs(flops / c - 1) <= budget.tolerance]
    if not near:
        return f"no rung within {100 * budget.tolerance:g} % of its flops"
    seed = spec.seeds[0] if values.get("seed") is None else _number(values["seed"])
    if seed is None or seed != int(seed) or seed < 0:
        return "seed is no whole number"
    point = {parameter.name: _value(parameter, values[parameter.name]) for parameter in spec.free_parameters}
    for parameter in spec.free_parameters:
        if not parameter.contains(point[parameter.name]):
            return f"{parameter.name} outside the space"
    verdict = feasible.judge(point)
    if isinstance(verdict, Rejection):
        return verdict.reason
    return Run(
        config=verdict.config.as_dict(),
        params=verdict.cost.params,
        embedder_share=verdict.cost.embedder_share,
        seed=int(seed),
        config_id=values.get("config_id"),
        rung=near[0],
        flops=round(flops),
        metrics={name: number for name, number in numbers.items() if number is not None},
    )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _value(parameter: Parameter, value: Any) -> Any:
    """As a proposal would have it: tables do not tell 64 from 64.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    for listed in parameter.values:
        if listed == value and not isinstance(listed, bool):
            return listed
    return int(value) if parameter.is_whole and float(value).is_integer() else float(value)


def _row(trial: str, run: Run, spec: SweepSpec) -> Record:
    return {
        "kind": "rung",
        "source": IMPORT,
        "trial": trial,
        "config_id": run.config_id,
        "rung": run.rung,
        "rung_flops": spec.budget.ladder_flops[run.rung],
        "seed": run.seed,
        "config": run.config,
        "status": "ok",
        "params": run.params,
        "embedder_share": run.embedder_share,
        "path_flops": run.flops,
        "task_flops": 0,
        "eval_flops": 0,
        "metrics": run.metrics,
        "checkpoint": None,
        "model": None,
    }
