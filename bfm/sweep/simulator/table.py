"""Known learning curves as an arena: any configuration can be run to any of its rows, at the rows' cost.

Enters: a table (see bfm.laws.tables) with columns config_id, flops, loss and the features that are named.
Leaves: a TableArena for the driver and the rows that its tasks bring. Policies know which rows exist, never their loss.

A configuration's row at a rung is its last one with at most the rung's C and more than the rung below; it has none
where the curve has none there. With a cooldown fraction f a row costs F_to - (1 - f) F_from, as in real sweeps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.laws.tables import ids_of, read_table
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Task
from bfm.sweep.policies.arena import Proposal
from bfm.sweep.simulator.run import simulated_row
from bfm.sweep.space.axes import Axes
from bfm.sweep.space.space import Place
from bfm.sweep.space.tiers import Tier

_SIZE_NAMES = ("N", "n", "params")
_FLOPS_SLACK = 1e-9
UNKNOWN_SIZE = 1
"""N of a table that names no column for it."""


@dataclass(frozen=True)
class Curve:
    """One configuration's run."""

    config: dict[str, Any]
    """config_id and the features."""
    params: int
    flops: tuple[float, ...]
    """Ascending."""
    losses: tuple[float, ...]
    resumable: bool

    def row_at(self, rungs: Sequence[float], rung: int) -> int | None:
        """Index of its row at a rung; None where it has none."""
        place = bisect_right(self.flops, rungs[rung] * (1 + _FLOPS_SLACK)) - 1
        low = rungs[rung - 1] * (1 + _FLOPS_SLACK) if rung else 0.0
        return place if place >= 0 and self.flops[place] > low else None

    def best_within(self, flops: float) -> float:
        """The lowest loss up to `flops`; inf where the curve begins later."""
        return _lowest(self.losses[: bisect_right(self.flops, flops * (1 + _FLOPS_SLACK))])


def read_curves(
    path: str | Path,
    features: Sequence[str],
    params_column: str | None = None,
    resumable_column: str | None = None,
    where: str | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> tuple[Curve, ...]:
    """The curves of a table, by config_id. Raises UserError that names file and column.

    `params_column` None: the feature called N, n or params, if there is one. `say`: as of read_table.
    """
    size = params_column or next((name for name in _SIZE_NAMES if name in features), None)
    others = [name for name in features if name != size]
    columns = ["config_id", "flops", "loss", *others, *filter(None, [size, resumable_column])]
    table = read_table(path, columns, where, say)
    for name in ("flops", "loss", *filter(None, [size])):
        _check_numbers(table[name], name, str(path))
    if size is not None and pc.any(pc.less(table[size], 1)).as_py():
        raise UserError(f"{size} has values below 1", file=str(path), key=size, fix="write numbers of parameters")
    ids = ids_of(table, "config_id")
    if ids.null_count:
        raise UserError("config_id is empty in some rows", file=str(path), key="config_id", fix="fill it")
    for name in others:
        _check_feature(table[name], name, str(path))
    if resumable_column is not None:
        _check_flag(table[resumable_column], resumable_column, str(path))
    groups: dict[str, list[dict[str, Any]]] = {}
    rows = table.select(list(dict.fromkeys(columns))).to_pylist()
    for config_id, row in zip(ids.to_pylist(), rows, strict=True):
        groups.setdefault(config_id, []).append(row)
    return tuple(_curve(name, groups[name], others, size, resumable_column, str(path)) for name in sorted(groups))


def _check_numbers(column: pa.ChunkedArray, name: str, path: str) -> None:
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        kind = "text" if pa.types.is_large_string(column.type) else column.type
        raise UserError(f"{name} is {kind}, not a number", file=path, key=name, fix="name another column")
    if name != "loss" and (column.null_count or not pc.all(pc.greater(column, 0)).as_py()):
        raise UserError(f"{name} has values that are not above 0", file=path, key=name, fix="leave those rows out")
    if name != "loss" and not pc.all(pc.is_finite(column)).as_py():
        raise UserError(f"{name} has values that are not finite", file=path, key=name, fix="leave those rows out")


def _check_feature(column: pa.ChunkedArray, name: str, path: str) -> None:
    """A number, a text or a yes or no: what a ledger can hold and a surrogate can tell apart."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    of_numbers = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean
    of_text = pa.types.is_string, pa.types.is_large_string
    if not any(is_kind(kind) for is_kind in (*of_numbers, *of_text, pa.types.is_null)):
        fix = "leave it out, or write it as number or text"
        raise UserError(f"{name} is {kind}", file=path, key="--features", fix=fix)
    if pa.types.is_floating(kind) and not pc.all(pc.is_finite(column)).as_py():
        fix = "leave it out, or those rows"
        raise UserError(f"{name} has values that are not finite", file=path, key="--features", fix=fix)


def _check_flag(column: pa.ChunkedArray, name: str, path: str) -> None:
    """A yes or no in every row: a text such as "no" would count as yes."""
    told = pa.types.is_boolean(column.type) or pa.types.is_integer(column.type)
    if not told or not {*column.unique().to_pylist()} <= {True, False}:
        fix = "write true or false in every row"
        raise UserError(f"{name} is not yes or no everywhere", file=path, key="--resumable-column", fix=fix)


def _curve(
    name: str, rows: list[dict[str, Any]], features: Sequence[str], size: str | None, resumable: str | None, path: str
) -> Curve:
    rows = sorted(rows, key=lambda row: row["flops"])
    flops = tuple(float(row["flops"]) for row in rows)
    if len(set(flops)) < len(flops):
        raise UserError(f"configuration {name} has two rows at one C", file=path, key="flops", fix="keep one of them")
    for feature in features:
        if len({row[feature] for row in rows}) > 1 or rows[0][feature] is None:
            raise UserError(
                f"configuration {name} has no single value of {feature}",
                file=path,
                key="--features",
                fix="leave it out",
            )
    if resumable is not None and len({row[resumable] for row in rows}) > 1:
        fix = "write one value for all of its rows"
        raise UserError(f"configuration {name} is and is not one run", file=path, key="--resumable-column", fix=fix)
    return Curve(
        config={"config_id": name, **{feature: rows[0][feature] for feature in features}},
        params=UNKNOWN_SIZE if size is None else round(rows[0][size]),
        flops=flops,
        losses=tuple(math.nan if row["loss"] is None else float(row["loss"]) for row in rows),
        resumable=True if resumable is None else bool(rows[0][resumable]),
    )


class TableArena:
    """Some curves, in the order in which they are proposed.

    Args:
        curves: the configurations that there are.
        rungs: the ladder's C.
        cooldown_fraction: f; the branch of every row is charged.
    """

    def __init__(self, curves: Sequence[Curve], rungs: Sequence[float], cooldown_fraction: float = 0.0) -> None:
        self._rungs, self._kept = rungs, 1.0 - cooldown_fraction
        self.curves = {curve.config["config_id"]: curve for curve in curves}
        self._places = {
            name: {rung: row for rung in range(len(rungs)) if (row := curve.row_at(rungs, rung)) is not None}
            for name, curve in self.curves.items()
        }
        self._pool: tuple[int, list[Proposal]] = (-1, [])
        self._proposals = [
            Proposal(curve.config, curve.params, "table") for name, curve in self.curves.items() if self._places[name]
        ]

    @cached_property
    def axes(self) -> Axes:
        """N and the features."""
        curves = list(self.curves.values())
        names = [name for name in curves[0].config if name != "config_id"]
        return Axes.of_columns(
            [curve.params for curve in curves], {name: [curve.config[name] for curve in curves] for name in names}
        )

    @property
    def num_points(self) -> int:
        """Curves with a row at some rung."""
        return len(self._proposals)

    def rungs(self, config: Mapping[str, Any]) -> Sequence[int]:
        """Rungs with a row."""
        return tuple(self._places[config["config_id"]])

    def climbs(self, config: Mapping[str, Any]) -> bool:
        """Whether the curve is one run."""
        return self.curves[config["config_id"]].resumable

    def row_flops(self, config: Mapping[str, Any], rung: int) -> float:
        """C of the row."""
        curve = self.curves[config["config_id"]]
        return curve.flops[self._places[config["config_id"]][rung]]

    def reserve_flops(self, config: Mapping[str, Any], rung: int, from_rung: int | None) -> int:
        """What the table says."""
        spared = 0.0 if from_rung is None or not self.climbs(config) else self._kept * self.row_flops(config, from_rung)
        return round(self.row_flops(config, rung) - spared)

    def places(self, config: Mapping[str, Any], rung: int, limits: Mapping[str, int]) -> list[Place]:
        """One worker; nothing runs out of memory in a table."""
        del config, rung, limits
        return [Place(Tier(), {"workers": 1}, 0)]

    def own(self, values: Mapping[str, Any]) -> Proposal:
        """None: there are no curves but the table's. Raises UserError."""
        raise UserError("known curves cannot be added to", fix="leave it out")

    def pool(self, state: SweepState, number: int) -> Sequence[Proposal]:
        """All curves that were not begun."""
        if self._pool[0] == number:
            return self._pool[1]
        begun = {trial.config["config_id"] for trial in state.trials.values()}
        fresh = [proposal for proposal in self._proposals if proposal.config["config_id"] not in begun]
        self._pool = number, fresh
        return fresh

    def execute(self, task: Task) -> dict[str, Any]:
        """The row that a task brings."""
        curve, loss = self.curves[task.config["config_id"]], self._loss(task.config["config_id"], task.rung)
        known = math.isfinite(loss)
        return simulated_row(
            task,
            curve.params,
            {"loss": loss if known else None},
            f"{task.trial}-r{task.rung}" if curve.resumable else None,
            status="ok" if known else "diverged",
        )

    def full_flops(self, top_flops: float) -> float:
        """Sum over curves of min(last C, top rung): what training them all would cost."""
        return float(sum(min(curve.flops[-1], top_flops) for curve in self.curves.values()))

    def regrets(self, state: SweepState) -> np.ndarray:
        """Per rung, best loss seen within its C minus the best there is; the worst known one if nothing was seen."""
        regrets, seen = [], math.inf
        for rung, flops in enumerate(self._rungs):
            best = min(curve.best_within(flops) for curve in self.curves.values())
            here = (trial.config["config_id"] for trial in state.trials.values() if rung in trial.rows)
            seen = min(seen, _lowest(self._seen(name, rung) for name in here))
            reached = seen if math.isfinite(seen) else self._worst(rung, best)
            # Where there is nothing to be seen there is nothing to regret.
            regrets.append(reached - best if math.isfinite(best) else 0.0)
        return np.array(regrets)

    def _worst(self, rung: int, best: float) -> float:
        """The worst known loss at a rung; `best` where it has none."""
        losses = (self._loss(name, rung) for name, rows in self._places.items() if rung in rows)
        return max(filter(math.isfinite, losses), default=best)

    def _seen(self, name: str, rung: int) -> float:
        """The best loss of a curve that was run to a rung: of all of its rows on the way if it is one run."""
        curve = self.curves[name]
        return curve.best_within(self._rungs[rung]) if curve.resumable else self._loss(name, rung)

    def _loss(self, name: str, rung: int) -> float:
        return self.curves[name].losses[self._places[name][rung]]


def _lowest(losses: Iterable[float]) -> float:
    """Of those that are numbers; inf where there is none."""
    return min(filter(math.isfinite, losses), default=math.inf)
