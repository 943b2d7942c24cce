"""A sweep as studies of Optuna, which optuna-dashboard opens: `bfm export-optuna`.

Enters: sweeps as their ledgers stand, and a journal file, a SQLite file or the URL of a database. Leaves: a study
`<sweep>/<metric>` per metric there, because only a study of one value has values on the way. Trials come in the
ledger's order; a trial's intermediate values are its rows, by rung index (C of a rung is in the study's attributes).

Optuna can add nothing to a trial that has ended. So a trial is running as long as its sweep may promote it, pruned when
the sweep has ended without, complete at the top rung, failed where it diverged, ran out of memory or was given up. Told
again, a study gets what is new; where an ended trial went on after all (a sweep that was extended), or the space has
changed, the study is written anew. Ledgers hold no time of day: a trial's duration is that of its training.
"""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from bfm.doors.loggers import SIZES
from bfm.errors import UserError
from bfm.laws.frontier import goal_of, metric_value
from bfm.report.floors import shown_name
from bfm.report.sweep_view import SweepView
from bfm.sweep.ledger.state import SweepState, Trial, spec_of
from bfm.sweep.space.parameters import Parameter, read_parameters

JOURNALS, DATABASES = (".journal", ".log"), (".db", ".sqlite", ".sqlite3")
_DISK = re.compile("readonly database|unable to open database|disk is full|disk I/O")
"""What SQLite says of a disk that takes nothing."""
Axes = dict[str, BaseDistribution]


@dataclass(frozen=True)
class Exported:
    """What came of one study."""

    study: str
    trials: int
    added: int
    changed: int
    """Running trials that have got further."""
    anew: bool
    """Whether the study was deleted and written again."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def line(self) -> str:
        """For a terminal."""
        how = "written anew" if self.anew else f"{self.added} added, {self.changed} changed"
        return f"{self.study}: {self.trials} trials, {how}"


def open_storage(target: str) -> BaseStorage:
    """The storage of a file or URL, begun where there is none. Raises UserError where it cannot be one."""
    suffix = Path(target).suffix
    if "://" not in target and suffix not in JOURNALS + DATABASES:
        fix = f"end it in {', '.join(JOURNALS + DATABASES)}, or give a database's URL"
        raise UserError(f"{suffix or 'no ending'} tells no kind of storage", file=target, fix=fix)
    try:
        if "://" in target:
            return RDBStorage(target)
        if not Path(target).absolute().parent.is_dir():
            raise UserError("its folder does not exist", file=target, fix="make it, or name another one")
        if suffix in JOURNALS:
            _check_journal(Path(target))
            return JournalStorage(JournalFileBackend(target))
        return RDBStorage(f"sqlite:///{Path(target).absolute()}")
    except (SQLAlchemyError, ImportError, RuntimeError, json.JSONDecodeError) as error:
        if _DISK.search(str(error)):
            raise OSError(errno.EIO, _first_line(error), target) from error
        raise UserError(_first_line(error), file=target, fix="name a new file, or one that Optuna wrote") from error


def _check_journal(path: Path) -> None:
    """Raises UserError for a file of somebody else's: Optuna takes a line that it cannot read for a torn one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as lines:
        first = lines.readline()
    if not first.startswith(b'{"op_code"'):
        raise UserError("is no journal of Optuna", file=str(path), fix="name a new file, or one that Optuna wrote")


def export_sweep(view: SweepView, storage: BaseStorage, metrics: Sequence[str]) -> list[Exported]:
    """Bring a sweep's studies up to its ledger, one per metric."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = _axes(view.state)
    return [_export(view, storage, metric, axes) for metric in metrics]


def own_metrics(state: SweepState) -> list[str]:
    """The metrics that the sweep has a frontier of, the one that selects first."""
    return [metric.name for metric in spec_of(state).metrics]


def _export(view: SweepView, storage: BaseStorage, metric: str, axes: Axes) -> Exported:
    name = f"{(view.state.spec or {}).get('name', view.folder)}/{metric}"
    wanted = [_trial(view.state, trial, metric, axes) for trial in view.state.trials.values()]
    study = _study(storage, name, metric)
    stored = study.get_trials(deepcopy=False)
    anew = len(stored) > len(wanted) or not all(map(_leads_to, stored, wanted))
    if anew:
        _check_own(study, view)
        optuna.delete_study(study_name=name, storage=storage)
        study, stored = _study(storage, name, metric), []
    _describe(study, view, metric)
    changed = sum(_advance(storage, before, now) for before, now in zip(stored, wanted, strict=False))
    study.add_trials(wanted[len(stored) :])
    return Exported(name, len(wanted), len(wanted) - len(stored), changed, anew)


def _check_own(study: optuna.Study, view: SweepView) -> None:
    """Raises UserError for what is about to be written anew and is another sweep's."""
    place = study.user_attrs.get("storage", view.store.uri)
    if place != view.store.uri:
        what = f"the study {study.study_name} there is that of another sweep ({place})"
        raise UserError(what, key="FILE", fix="name a file of its own, or give the sweeps different names")


def _study(storage: BaseStorage, name: str, metric: str) -> optuna.Study:
    return optuna.create_study(storage=storage, study_name=name, direction=goal_of(metric), load_if_exists=True)


def _describe(study: optuna.Study, view: SweepView, metric: str) -> None:
    spec = view.state.spec or {}
    floors = {shown_name(name): values[metric] for name, values in view.floors.items() if metric in values}
    told = {"ladder_flops": spec["budget"]["ladder_flops"], "storage": view.store.uri, "floors": floors}
    for name, value in told.items():
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)


# ---------------------------------------------------------------- trials


def _trial(state: SweepState, trial: Trial, metric: str, axes: Axes) -> FrozenTrial:
    values = {rung: value for rung in sorted(trial.rows) if math.isfinite(value := _value(trial, rung, metric))}
    stage, told = _stage(state, trial, metric)
    last = values[max(values)] if values else None
    made = create_trial(
        state=stage,
        value=last if stage in (TrialState.COMPLETE, TrialState.PRUNED) else None,
        params={name: trial.config.get(name) for name in axes},
        distributions=axes,
        user_attrs={"trial": trial.trial, "source": trial.source, "seed": trial.seed, "status": told, **_sizes(trial)},
        intermediate_values=values,
    )
    worked_s = sum((row.get("train_s") or 0.0) + (row.get("eval_s") or 0.0) for row in trial.rows.values())
    now = datetime.now()
    made.datetime_start = now - timedelta(seconds=worked_s)
    made.datetime_complete = now if stage.is_finished() else None
    return made


def _stage(state: SweepState, trial: Trial, metric: str) -> tuple[TrialState, str]:
    """Optuna's state of a trial, and ours."""
    top = len((state.spec or {})["budget"]["ladder_flops"]) - 1
    failed = [row["status"] for row in trial.rows.values() if row["status"] != "ok"]
    if failed:
        return TrialState.FAIL, failed[-1]
    if top in trial.rows:
        known = math.isfinite(_value(trial, top, metric))
        return (TrialState.COMPLETE, "ok") if known else (TrialState.FAIL, f"no {metric}")
    if trial.trial in state.given_up:
        return TrialState.FAIL, "given up"
    if state.finished is not None:
        return TrialState.PRUNED, "not promoted"
    is_at_work = trial.trial in {name for name, _ in state.attempts}
    return TrialState.RUNNING, "training" if is_at_work else "may be promoted"


def _value(trial: Trial, rung: int, metric: str) -> float:
    row = trial.rows[rung]
    return metric_value(row, metric) if row["status"] == "ok" else math.nan


def _sizes(trial: Trial) -> dict[str, Any]:
    """N, s, D, epochs and C of the last row; the nominal N where there is none."""
    if not trial.rows:
        return {"N": trial.params}
    row = trial.rows[max(trial.rows)]
    return {name: row[key] for name, key in SIZES.items() if row.get(key) is not None}


def _leads_to(stored: FrozenTrial, wanted: FrozenTrial) -> bool:
    """Whether what is stored of a trial may stay: it has ended as it should, or has not and has no other values."""
    if (stored.params, stored.distributions) != (wanted.params, wanted.distributions):
        return False
    if stored.state.is_finished():
        found, due = ((trial.state, trial.values, trial.intermediate_values) for trial in (stored, wanted))
        return found == due
    return stored.intermediate_values.items() <= wanted.intermediate_values.items()


def _advance(storage: BaseStorage, stored: FrozenTrial, wanted: FrozenTrial) -> bool:
    """Tell of a running trial what it has not been told yet; whether there was anything."""
    if stored.state.is_finished():
        return False
    place = stored._trial_id
    values = wanted.intermediate_values.items() - stored.intermediate_values.items()
    attributes = {name: told for name, told in wanted.user_attrs.items() if stored.user_attrs.get(name) != told}
    for rung, value in sorted(values):
        storage.set_trial_intermediate_value(place, rung, value)
    for name, told in attributes.items():
        storage.set_trial_user_attr(place, name, told)
    if wanted.state.is_finished():
        storage.set_trial_state_values(place, wanted.state, wanted.values)
    return bool(values or attributes or wanted.state.is_finished())


# ---------------------------------------------------------------- axes


def _axes(state: SweepState) -> Axes:
    """What is searched, in Optuna's words: the space's free parameters and whatever else its trials differ in."""
    space = {parameter.name: parameter for parameter in read_parameters((state.spec or {})["parameters"])}
    seen: dict[str, dict[Any, None]] = {}
    for trial in state.trials.values():
        for name, value in trial.config.items():
            if isinstance(value, (int, float, str)) or value is None:
                seen.setdefault(name, {})[value] = None
    free = {name for name, parameter in space.items() if parameter.is_free}
    names = sorted(name for name in seen if name in free or len(seen[name]) > 1)
    return {name: _distribution(space.get(name), list(seen[name])) for name in names}


def _distribution(parameter: Parameter | None, seen: Sequence[Any]) -> BaseDistribution:
    """The range of a parameter, widened to values from an earlier or another space; else a choice."""
    if parameter is None or parameter.values or not all(map(_is_number, seen)):
        values = parameter.values if parameter is not None else ()
        return CategoricalDistribution(list(dict.fromkeys([*values, *seen])))
    low, high = min([parameter.low, *seen]), max([parameter.high, *seen])
    is_log = parameter.is_log and low > 0
    if parameter.is_whole and all(value == int(value) for value in seen):
        return IntDistribution(math.floor(low), math.ceil(high), log=is_log)
    return FloatDistribution(low, high, log=is_log)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n", 1)[0]
