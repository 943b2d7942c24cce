"""Runs to fit a law on: canonical columns from a sweep's ledger rows or from anyone's table, checked once for all laws.

Columns (a run has NaN where it has no value): params (N), events (D), flops (C), loss (the metric that is fitted),
budget (nominal C of an iso-FLOP group), batch (B), steps, negatives (K), share (s), rate (learning rate),
unique_events, seed, target (of events-to-target tables). `curve` names runs that belong to one training run (its rungs
or probes). Whatever else a sweep varied is a column by the name of its setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.laws.frontier import Row, goal_of, measured, metric_value, numbers
from bfm.laws.tables import NUMBER, ids_of, read_table
from bfm.laws.transform import has_loss

NUMBERS = (
    "params",
    "events",
    "flops",
    "loss",
    "budget",
    "batch",
    "steps",
    "negatives",
    "share",
    "rate",
    "unique_events",
    "seed",
    "target",
)
TEXTS = ("curve",)
SETTINGS = ("share", "rate", "negatives")
"""Columns of a table that are settings of their own, beside N and the batch."""
_COLUMN_OF = {"embedder_share": "share", "learning_rate": "rate"}
"""Settings whose column has another name."""
_ELSEWHERE = ("params", "groups_per_step")
"""Settings that stand as N and batch."""
_SECOND_STAGE = ("freeze_at_flops", "negatives_exponent")
METRIC, SETTING = "metric", "setting"
"""The roles of further metrics of a table and of what else its runs differ in; both may be given several times."""
SAME = 0.02
"""Values of a column whose logs differ by less are one."""
_SAME_COST = 0.05
_DEDUPLICATED = (
    "training FLOPs, forward and backward, of the matmuls on the path that made a run; an item is embedded once per "
    "negative group however often it occurs there"
)


@dataclass(frozen=True)
class Runs:
    """A table of runs."""

    source: str
    columns: Mapping[str, np.ndarray]
    """Canonical name -> floats (`curve`: texts), all of one length."""
    names: tuple[str, ...]
    """How the source names its runs: for outliers and refusals."""
    metric: str
    """What `loss` is."""
    metrics: Mapping[str, np.ndarray]
    """Every metric by name, the fitted one included."""
    errors: Mapping[str, np.ndarray]
    """Standard errors of metrics, as far as they are known."""
    definitions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """Columns, beside N and batch, that the runs were to differ in: floats, or texts where it is no number."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def has(self, *columns: str) -> bool:
        """Whether all columns are there."""
        return all(column in self.columns for column in columns)

    def require(self, law: str, *columns: str) -> None:
        """Raises UserError naming the first column that a law needs and the runs lack."""
        for column in columns:
            if column not in self.columns:
                raise UserError(
                    f"{law} needs the column {column}", file=self.source, key="--columns", fix=f"add {column}=NAME"
                )

    def select(self, mask: np.ndarray) -> Runs:
        """The runs that a boolean mask (or an array of places) picks."""
        places = np.flatnonzero(mask) if mask.dtype == bool else mask
        return replace(
            self,
            columns={name: values[places] for name, values in self.columns.items()},
            names=tuple(self.names[place] for place in places),
            metrics={name: values[places] for name, values in self.metrics.items()},
            errors={name: values[places] for name, values in self.errors.items()},
        )

    def fitting(self, metric: str) -> Runs:
        """The same runs with another metric as `loss`; runs without a value of it are left out."""
        if metric not in self.metrics:
            known = ", ".join(self.metrics)
            raise UserError(f"there is no metric {metric!r}", file=self.source, key="--metric", fix=f"one of {known}")
        values = self.metrics[metric]
        return replace(self, metric=metric, columns={**self.columns, "loss": values}).select(np.isfinite(values))

    def budgets(self) -> dict[float, np.ndarray]:
        """C of each iso-FLOP group, ascending, -> places of its runs: by `budget`, or by equal `flops` within 2 %."""
        level_R = self["budget"] if self.has("budget") else levels(self["flops"])
        return {float(flops): np.flatnonzero(level_R == flops) for flops in np.unique(level_R)}

    @property
    def curves_R(self) -> np.ndarray:
        """The training run of each run; each is its own where the table names none."""
        return self["curve"] if self.has("curve") else np.arange(len(self))


def levels(values_R: np.ndarray) -> np.ndarray:
    """Each value's level: those that no gap of more than 2 % parts are one, their median."""
    order = np.argsort(values_R, kind="stable")
    number = np.concatenate([[0], np.cumsum(np.diff(np.log(values_R[order])) > SAME)])
    level_R = np.empty(len(values_R))
    for one in np.unique(number):
        members = order[number == one]
        level_R[members] = float(np.median(values_R[members]))
    return level_R


def parse_columns(text: str) -> list[tuple[str, str]]:
    """`params=N,loss=loss,metric=recall` as (role, column) pairs. Raises UserError."""
    pairs: list[tuple[str, str]] = []
    known = (*NUMBERS, *TEXTS, METRIC, SETTING)
    for part in text.split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise UserError(f"{part!r} is not ROLE=COLUMN", key="--columns", fix="write e.g. params=N,loss=loss")
        if role not in known:
            raise UserError(f"unknown role {role!r}", key="--columns", fix=f"one of {', '.join(known)}")
        again = role if role not in (METRIC, SETTING) else f"{role}={column}"
        if (role, column) in pairs or again in (before for before, _ in pairs):
            raise UserError(f"{again} is given twice", key="--columns", fix="name one column for it")
        pairs.append((role, column))
    return pairs


def from_table(path: str | Path, columns: Sequence[tuple[str, str]], where: str | None = None) -> Runs:
    """Runs of a table's files as they are (bfm.laws.tables); `columns` as of `parse_columns`.

    Raises UserError (file, column, what to do) for what cannot be read, losses that are not above 0, tables whose C is
    counted in two ways, and where no run is left.
    """
    file = str(path)
    told: list[str] = []
    table = read_table(path, [column for _, column in columns], where, told.append)
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, np.ndarray] = {}
    metric, settings = "loss", [role for role, _ in columns if role in SETTINGS]
    for role, column in columns:
        if role in TEXTS:
            values[role] = np.array(list(map(str, ids_of(table, column).to_pylist())))
            continue
        if role == SETTING:
            values[column] = _setting(table[column].to_pylist(), file, column)
            settings.append(column)
            continue
        numbers = np.array([_number(value, file, column) for value in table[column].to_pylist()])
        if role in ("loss", METRIC):
            metrics[column] = numbers
        if role != METRIC:
            values[role] = numbers
        metric = column if role == "loss" else metric
    if "flops_version" in table.column_names and len(set(table["flops_version"].to_pylist())) > 1:
        _refuse_mixed(file, "flops_version has several values")
    definitions = {role: f"column {column}" for role, column in columns}
    definitions["C"] = definitions.pop("flops", "not given")
    names = tuple(f"row {number}" for number in table[NUMBER].to_pylist())
    assumed = "params" in values and "events" in values and "loss" in values and "flops" not in values
    warnings = tuple(told)
    if assumed:
        warnings += ("the table gives no C: 6 N D is taken, which small models and large catalogues are not",)
    if {"unique_events", "events"} <= set(values) and not (values["events"] > values["unique_events"]).any():
        warnings += ("no run has more events than unique_events: what a repeated event is worth is not asked",)
    asked = (*settings, *(["unique_events"] if "unique_events" in values else []))
    return _checked(Runs(file, values, names, metric, metrics, {}, definitions, warnings, tuple(settings)), asked)


def from_rows(rows: Iterable[Row], metric: str = "nll", *, source: str = "ledger", probes: bool = False) -> Runs:
    """Runs of a sweep's ledger: its rung rows, or its probe rows. Raises UserError as `from_table`."""
    kind = "probe" if probes else "rung"
    found = measured(rows, metric, kind)
    if not found:
        raise UserError(f"no {kind} row has {metric}", file=source, key="--metric", fix="let the sweep finish a rung")
    found, warnings = _with_loss(found, metric, source)
    if len({row.get("flops_version") for row in found}) > 1:
        _refuse_mixed(source, "rows of several versions of the objective and of C")
    searched = _searched(found)
    if "copy" in searched:
        kinds = " and ".join(sorted(set(map(str, searched["copy"].tolist()))))
        what = f"rows of models with copy: {kinds}, which have laws of their own"
        raise UserError(what, file=source, key="copy", fix="fit each apart: name its sweep, or give --where on a table")
    metrics = numbers(found, "metrics", sorted({name for row in found for name in row.get("metrics") or {}}))
    values = {
        "params": _column(found, "params"),
        "events": _column(found, "events"),
        "flops": _column(found, "path_flops"),
        "budget": _column(found, "rung_flops"),
        "batch": _column(found, "batch_events"),
        "steps": _column(found, "steps"),
        "share": _column(found, "embedder_share"),
        "unique_events": _column(found, "unique_events"),
        "seed": _column(found, "seed"),
        "negatives": np.array([float((row.get("config") or {}).get("negatives") or 0) for row in found]),
        **{name: values for name, values in searched.items() if name != "share"},
        "loss": metrics[metric],
    }
    values = {name: column for name, column in values.items() if column.dtype.kind != "f" or np.isfinite(column).any()}
    values["curve"] = np.array([str(row["trial"]) for row in found])
    definitions = {
        "C": _DEDUPLICATED + _without_deduplication(found),
        "N": "dense weights after the field tokens and before the final logits: embedder + contextualizer",
        "D": "training positions with a next-event target, repeats counted",
        "metric": f"{metric}, to be {goal_of(metric)}d, over the full catalogue",
    }
    return _checked(
        Runs(
            source,
            values,
            tuple(map(run_name, found)),
            metric,
            metrics,
            numbers(found, "errors", list(metrics)),
            definitions,
            (*warnings, *_differing(found)),
            tuple(searched),
        )
    )


def _with_loss(rows: Sequence[Row], metric: str, source: str) -> tuple[list[Row], list[str]]:
    """(the rows that a law can take, what is said of the others)."""
    can_R = has_loss(metric, np.array([metric_value(row, metric) for row in rows]))
    if not can_R.any():
        what = f"no row has a {metric} that a law can take: all {len(rows)} are 0 or beyond its range"
        raise UserError(what, file=source, key="--metric", fix="fit another metric, or train models that score in it")
    left_out = int((~can_R).sum())
    said = [f"{left_out} of {len(rows)} rows have {metric} 0 or beyond its range: left out"] if left_out else []
    return [row for row, can in zip(rows, can_R, strict=True) if can], said


def _differing(rows: Sequence[Row]) -> tuple[str, ...]:
    """What rows differ in without having been searched for it."""
    tables = {row.get("table_params") for row in rows}
    found = [] if len(tables) < 2 else [f"table_params differ between runs ({len(tables)} values)"]
    seeds: dict[Any, set[Any]] = {}
    for row in rows:
        seeds.setdefault(row.get("rung_flops"), set()).add(row.get("seed"))
    counts = sorted(map(len, seeds.values()))
    if counts[0] < counts[-1]:
        found.append(f"budgets have {counts[0]} to {counts[-1]} seeds: what a seed adds is told by the latter")
    return tuple(found)


def _searched(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Column -> values of every setting that the rows' configurations differ in: floats, or texts where it is none.

    Those of a second stage say nothing of runs without one, which take the first one's.
    """
    configs = [row.get("config") or {} for row in rows]
    staged = next((config for config in configs if config.get("negatives")), {})
    absent = {name: staged.get(name) for name in _SECOND_STAGE}
    configs = [config if config.get("negatives") else {**config, **absent} for config in configs]
    found = {}
    for name in sorted(set().union(*configs) - set(_ELSEWHERE)):
        values = [config.get(name) for config in configs]
        if any(value != values[0] for value in values[1:]):
            numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            found[_COLUMN_OF.get(name, name)] = np.array(values, float) if numeric else np.array(list(map(str, values)))
    return found


def run_name(row: Row) -> str:
    """How laws name a run of a ledger."""
    return f"{row['trial']} at {float(row['rung_flops']):g}"


def _checked(runs: Runs, told: Sequence[str] = ()) -> Runs:
    """Without NaN rows and exact duplicates (both said); refuses what no law can take.

    `told` are further columns of which every run is to have a value, 0 where it is a setting's.
    """
    warnings = list(runs.warnings)
    known = ("params", "events", "flops", "loss", "batch", "steps", "budget")
    needed = [*(name for name in known if runs.has(name)), *(name for name in told if runs[name].dtype.kind == "f")]
    finite = np.all([np.isfinite(runs[name]) for name in needed], axis=0) if needed else np.ones(len(runs), bool)
    if not finite.all():
        warnings.append(f"{int((~finite).sum())} of {len(runs)} runs have no finite {' or '.join(needed)}: left out")
        runs = runs.select(finite)
    if len(runs) == 0:
        raise UserError("no run with finite values is left", file=runs.source, fix="check the columns")
    for name in needed:
        where, low_R = ("below 0", runs[name] < 0) if name in runs.settings else ("at or below 0", runs[name] <= 0)
        if low_R.any():
            raise UserError(
                f"{low_R.sum()} of {len(runs)} runs have {name} {where}, first {runs.names[int(np.argmax(low_R))]}",
                file=runs.source,
                key=name,
                fix="correct them, or keep them out with --where",
            )
    if runs.has("share") and (over_R := runs["share"] > 1).any():
        what = f"{over_R.sum()} of {len(runs)} runs have a share above 1, first {runs.names[int(np.argmax(over_R))]}"
        raise UserError(what, file=runs.source, key="share", fix="give the embedder's part of N, from 0 to 1")
    first: dict[tuple[Any, ...], int] = {}
    parts = [*runs.columns.values(), *runs.metrics.values()]
    for place, key in enumerate(zip(*(part.tolist() for part in parts), strict=True)):
        first.setdefault(key, place)
    if len(first) < len(runs):
        warnings.append(f"{len(runs) - len(first)} duplicate runs: each is counted once")
        runs = runs.select(np.array(list(first.values())))
    if runs.has("params", "events", "flops"):
        _check_cost(runs)
    return replace(runs, warnings=tuple(warnings))


def _check_cost(runs: Runs) -> None:
    """C / (N D) is one number for runs of one size and one setting; two of them are two ways to count C."""
    per_param_event = runs["flops"] / (runs["params"] * runs["events"])
    names = dict.fromkeys(("params", "share", "negatives", "batch", *runs.settings))
    settings = [runs[name].tolist() for name in names if runs.has(name)]
    same: dict[tuple[Any, ...], list[float]] = {}
    for key, ratio in zip(zip(*settings, strict=True), per_param_event.tolist(), strict=True):
        same.setdefault(key, []).append(ratio)
    for key, ratios in same.items():
        low, high = min(ratios), max(ratios)
        # One way of counting may drift with rounding; two ways leave a gap between them.
        ordered = np.sort(np.log(ratios))
        if high > (1 + _SAME_COST) * low and np.diff(ordered).max() > 0.8 * (ordered[-1] - ordered[0]):
            _refuse_mixed(runs.source, f"at N = {key[0]:g} C is {low:.3g} and {high:.3g} times N D")


def _refuse_mixed(source: str, what: str) -> None:
    raise UserError(
        f"C is counted in more than one way ({what})",
        file=source,
        key="flops",
        fix="keep one definition with --where, recompute C for all runs, or name a nominal C as budget=COLUMN",
    )


def _without_deduplication(rows: Sequence[Row]) -> str:
    ratios = _column(rows, "undeduplicated_flops") / _column(rows, "path_flops")
    known = ratios[np.isfinite(ratios)]
    if not len(known):
        return ""
    return f"; embedding the item of every event anew would be {known.min():.3g} to {known.max():.3g} times that"


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([float(value) if isinstance(value := row.get(name), (int, float)) else math.nan for row in rows])


def _setting(values: list[Any], file: str, column: str) -> np.ndarray:
    """Floats, or texts where some value is no number."""
    if column in (*NUMBERS, *TEXTS):
        raise UserError(f"{column} is the name of a role", file=file, key="--columns", fix="rename the column")
    told = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in told):
        return np.array([math.nan if value is None else float(value) for value in values])
    return np.array(list(map(str, values)))


def _number(value: Any, file: str, column: str) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        fix = "name a column of numbers"
        raise UserError(f"{value!r} is no number", file=file, key=column, fix=fix) from error
