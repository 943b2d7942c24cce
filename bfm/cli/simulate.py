"""`bfm simulate`: policies on a virtual clock, over known curves or under a planted law."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bfm.cli.common import Json, Overrides, number, show, whole
from bfm.errors import UserError

if TYPE_CHECKING:
    from bfm.sweep.simulator.fleet import Fleet

app = typer.Typer()
_OF_SPACE = {"law", "price_per_hour", "efficiency", "overrides"}
_OF_CURVES = {
    "rungs",
    "budget_fraction",
    "features",
    "params_column",
    "resumable_column",
    "where",
    "subset",
    "eta",
    "cooldown_fraction",
}
"""Parameters that only one of the two ways to simulate takes."""


@app.command()
def simulate(
    context: typer.Context,
    space: Annotated[Path | None, typer.Argument(help="Search-space YAML (with --law).")] = None,
    law: Annotated[str | None, typer.Option(help="Planted law for a space: paper.")] = None,
    curves: Annotated[
        str | None, typer.Option(help="Table of known curves: config_id, flops, loss and the features.")
    ] = None,
    rungs: Annotated[str | None, typer.Option(help="C of the rungs, e.g. 1e19,4e19 (with --curves).")] = None,
    budget_fraction: Annotated[float, typer.Option(help="Budget over what training all curves would cost.")] = 0.15,
    features: Annotated[str, typer.Option(help="Columns that policies may know, comma-separated.")] = "",
    params_column: Annotated[
        str | None, typer.Option(help="Model size (default: N, n or params of the features).")
    ] = None,
    resumable_column: Annotated[str | None, typer.Option(help="Whether a curve is one run (default: all are).")] = None,
    where: Annotated[str | None, typer.Option(help="Row filter: dataset == 'rw' and decay != 'chinchilla'.")] = None,
    subset: Annotated[float, typer.Option(help="Share of the curves, drawn anew for each seed.")] = 1.0,
    policy: Annotated[str, typer.Option(help="Policies, comma-separated (default: frontier, or the space's).")] = "",
    seeds: Annotated[int, whole("How many seeds.", 1)] = 1,
    eta: Annotated[float, typer.Option(help="Of the ASHA policies (with --curves).")] = 4.0,
    cooldown_fraction: Annotated[
        float, typer.Option(help="Share of a row's C in its cooldown branch (with --curves).")
    ] = 0.0,
    workers: Annotated[str, typer.Option(help="How many, or a schedule: 8,64@2h,16@1d.")] = "1",
    throughput: Annotated[float, number("Training FLOP/s of a worker.", above=True)] = 1e15,
    efficiency: Annotated[float, typer.Option(help="Twice the workers on a task are twice this as fast.")] = 0.9,
    startup_s: Annotated[float, typer.Option(help="Seconds until a new worker is ready.")] = 0.0,
    task_startup_s: Annotated[float, typer.Option(help="Seconds before a task trains.")] = 0.0,
    preempted_per_hour: Annotated[float, typer.Option(help="Preemptions of a worker per hour.")] = 0.0,
    notice_s: Annotated[float, typer.Option(help="From a notice to a preemption; 0: none is given.")] = 120.0,
    failure_share: Annotated[float, typer.Option(help="Share of tasks that fail.")] = 0.0,
    straggler_share: Annotated[float, typer.Option(help="Share of tasks at a quarter of the speed.")] = 0.0,
    price_per_hour: Annotated[float, number("Of a worker that is there, busy or not, for the cost of a space.")] = 0.0,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run sweeps on a virtual clock: regret against known curves, or time and cost of a space under a law.

    bfm simulate --curves runs.parquet --rungs 1e19,4e19 --features N,depth --policy frontier,asha-promote --seeds 20

    bfm simulate search_spaces/full_study.yaml --law paper --workers 64 --throughput 4e14 --price-per-hour 2.5
    """
    from bfm.report.console import Display
    from bfm.sweep.simulator.contest import Contest, as_dict, compete, render
    from bfm.sweep.simulator.fleet import Fleet, parse_schedule
    from bfm.sweep.simulator.table import read_curves

    if (space is None) == (curves is None):
        raise UserError("needs a space or --curves", key="simulate", fix="give one of them: SPACE.yaml --law paper")
    _check_serves(context, _OF_CURVES if curves is None else _OF_SPACE, "a space" if curves is None else "--curves")
    fleet = Fleet(
        schedule=parse_schedule(workers),
        flops_per_s=throughput,
        startup_s=startup_s,
        task_startup_s=task_startup_s,
        preempted_per_hour=preempted_per_hour,
        failure_share=failure_share,
        straggler_share=straggler_share,
        notice_s=notice_s,
        efficiency=efficiency,
    )
    if space is not None:
        _space(space, law, fleet, policy, seeds, price_per_hour, overrides, as_json)
        return
    assert curves is not None
    ladder, policies = _ladder(rungs), _policies(policy or "frontier")
    with Display("simulate") as display:
        known = read_curves(curves, _names(features), params_column, resumable_column, where, display.say)
        contest = Contest(known, ladder, budget_fraction, subset, cooldown_fraction, eta, fleet=fleet)
        standings = compete(contest, policies, range(seeds), display.show)
    show(as_dict(curves, contest, standings), as_json, render)


def _space(
    space: Path,
    law: str | None,
    fleet: Fleet,
    policy: str,
    seeds: int,
    price_per_hour: float,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    from bfm.report.console import Display
    from bfm.sweep.simulator.forecast import as_dict, forecast, render
    from bfm.sweep.simulator.law import law_named
    from bfm.sweep.space.spec import resolve

    if law is None:
        raise UserError("a space needs a law", key="--law", fix="write --law paper")
    spec, truth = resolve(space, overrides or []), law_named(law)
    with Display("simulate") as display:
        made = forecast(spec, truth, fleet, _policies(policy or spec.scheduler.type), range(seeds), display.show)
    show(as_dict(spec, law, fleet, price_per_hour, made), as_json, render)


def _check_serves(context: typer.Context, others: Collection[str], mode: str) -> None:
    """Raises UserError for an option that says nothing of what is simulated."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in others and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"says nothing of {mode}", key=parameter.opts[0], fix="leave it out")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _ladder(text: str | None) -> tuple[int, ...]:
    from bfm.units import parse_count

    if not text:
        raise UserError("is missing", key="--rungs", fix="write the C of the rungs, e.g. 1e19,4e19")
    return tuple(parse_count(part, key="--rungs") for part in _names(text))


def _policies(text: str) -> list[str]:
    from bfm.sweep.space.settings import POLICIES
    from bfm.yaml import did_you_mean

    names = list(dict.fromkeys(_names(text)))
    for name in names:
        if name not in POLICIES:
            raise UserError(f"unknown policy {name!r}", key="--policy", fix=did_you_mean(name, POLICIES))
    return names
