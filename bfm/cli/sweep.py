"""Sweeps: plan, run, watch, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bfm.cli.common import Json, Overrides, chosen_metrics, number, show, show_either, with_shards
from bfm.errors import UserError

app = typer.Typer()


@app.command()
def plan(
    space: Annotated[Path, typer.Argument(help="Search-space YAML.")],
    overrides: Overrides = None,
    shards: Annotated[str | None, typer.Option(help="Override data.shards.")] = None,
    probe_seconds: Annotated[float, number("How long to measure this machine; 0: no times.", high=3600)] = 20.0,
    gpu: Annotated[str | None, typer.Option(help="Price it for this card: a100, h100, ...")] = None,
    throughput: Annotated[float | None, number("Price it at this speed of one worker, in FLOP/s.", above=True)] = None,
    price_per_hour: Annotated[float | None, number("Of one worker, in any currency.")] = None,
    as_json: Json = False,
) -> None:
    """What a sweep would train and cost, and what is infeasible and why. Trains nothing but the probe.

    bfm plan search_spaces/allocation.yaml --gpu h100 --price-per-hour 2.5
    """
    import torch

    from bfm.sweep.plan.machine import Machine
    from bfm.sweep.plan.plan import plan as make_plan
    from bfm.sweep.plan.plan import render
    from bfm.sweep.plan.price import bill, bill_text, price_of
    from bfm.sweep.space.on_log import open_space
    from bfm.sweep.space.spec import resolve
    from bfm.training.single import measure_speed

    price = price_of(gpu, throughput, price_per_hour)
    opened, machine = open_space(resolve(space, with_shards(overrides, shards))), Machine.here()
    # As a task is trained: more threads than a slot has would wait for each other.
    torch.set_num_threads(max(1, int(min(opened.spec.scaling.tiers[0][0].cpus, machine.cores))))
    measure = (
        (lambda config, seconds: measure_speed(config, opened.shards, seconds))
        if probe_seconds > 0 and not price
        else None
    )
    made = make_plan(opened.spec, opened.costs, machine, measure, probe_seconds)
    seen_rule = opened.protocol.seen_rule
    priced = bill(made, price) if price else None
    shown = {**made.as_dict(), "seen_items": seen_rule, "bill": priced.as_dict() if priced else None}
    parts = [render(made), *([bill_text(priced)] if priced else []), f"seen items {seen_rule}"]
    show(shown, as_json, lambda _: "\n\n".join(parts))


@app.command()
def sweep(
    space: Annotated[Path, typer.Argument(help="Search-space YAML.")],
    storage: Annotated[str, typer.Option(help="Folder or URI under which sweeps are kept.")] = "runs",
    name: Annotated[str | None, typer.Option(help="Name of the sweep (default: the file's).")] = None,
    resume: Annotated[str, typer.Option(help="auto, never or must.")] = "auto",
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on with rungs above, another space, further seeds, another scheduler.")
    ] = False,
    runs: Annotated[
        str | None, typer.Option("--import", help="Parquet, CSV or JSON files of runs trained elsewhere.")
    ] = None,
    overrides: Overrides = None,
    shards: Annotated[str | None, typer.Option(help="Override data.shards.")] = None,
) -> None:
    """Run a sweep on this machine, or on the cluster that RAY_ADDRESS names; resumable at any point."""
    from ray_jobs.sweep import sweep_verb

    overrides = with_shards(overrides, shards)
    raise SystemExit(
        sweep_verb(space, storage, name=name, resume=resume, extend=extend, runs=runs, overrides=overrides)
    )


@app.command()
def study(
    spaces: Annotated[list[Path], typer.Argument(metavar="SPACE...", help="Search-space YAMLs, run in this order.")],
    name: Annotated[str, typer.Option(help="Name of the study: its folder under the storage.")],
    storage: Annotated[str, typer.Option(help="Folder or URI under which studies are kept.")] = "runs",
    overrides: Overrides = None,
    shards: Annotated[str | None, typer.Option(help="Override data.shards of every space.")] = None,
) -> None:
    """Run several spaces one after the other as STORAGE/NAME/<space>; the same command goes on where it stopped."""
    from ray_jobs.study import study_verb

    raise SystemExit(study_verb(spaces, storage, name, with_shards(overrides, shards)))


@app.command()
def status(
    sweep_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URI of a sweep.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until it has ended.")] = False,
    every: Annotated[float, number("Seconds between looks, with --watch.", 1)] = 5.0,
    as_json: Json = False,
) -> None:
    """Where a sweep stands, from its storage alone (running or not), beside what counting reaches without training."""
    from bfm.report import standing
    from bfm.report.sweep_view import read_sweep
    from bfm.sweep.ledger.ledger import collector_paused

    if watch:
        standing.watch(lambda: read_sweep(sweep_dir), every_s=every, as_json=as_json)
        return
    with collector_paused():
        view = read_sweep(sweep_dir)
        show_either(as_json, view.as_dict, lambda: standing.status_text(view))


@app.command()
def report(
    sweep_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URI of a sweep or a study.")],
    as_json: Json = False,
) -> None:
    """Write report/index.html and runs.parquet of a sweep, and print its frontier; of a study, one page of its laws."""
    from bfm.report.study import publish_study
    from bfm.report.sweep_report import publish_report, report_text
    from bfm.report.sweep_view import read_sweep
    from bfm.sweep.ledger.study import is_study

    if is_study(sweep_dir):
        files = publish_study(sweep_dir)
        show({"files": files}, as_json, lambda _: f"report       {files[0]}")
        return
    view = read_sweep(sweep_dir)
    files = publish_report(view)
    show_either(as_json, lambda: {"frontier": view.frontier_dicts(), "files": files}, lambda: report_text(view, files))


@app.command("export-optuna")
def export_optuna(
    sweep_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URI of a sweep or a study.")],
    target: Annotated[str, typer.Argument(metavar="FILE", help="x.journal, x.db (SQLite), or a database's URL.")],
    metric: Annotated[
        str | None, typer.Option(help="Metrics, comma-separated, or all (default: those that the sweep selects by).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a sweep as Optuna studies, one per metric, for optuna-dashboard; again, to add what is new.

    bfm export-optuna runs/mine mine.journal && optuna-dashboard mine.journal
    """
    from bfm.doors.optuna_storage import export_sweep, open_storage, own_metrics
    from bfm.laws.frontier import metric_names
    from bfm.report.study import read_study

    sweeps = [sweep for sweep in read_study(sweep_dir) if sweep.has_begun]
    known = [list(dict.fromkeys([*metric_names(view.rows), *own_metrics(view.state)])) for view in sweeps]
    # One that has no rows yet, or other metrics, is no reason to export none.
    asked = chosen_metrics(metric, list(dict.fromkeys(name for names in known for name in names)), [])
    storage, told = open_storage(target), []
    for view, names in zip(sweeps, known, strict=True):
        wanted = own_metrics(view.state) if metric is None else [name for name in asked if name in names]
        told += export_sweep(view, storage, wanted)
    show({"studies": [done.as_dict() for done in told]}, as_json, lambda _: "\n".join(done.line() for done in told))


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="log, space or train.")]) -> None:
    """The JSON schema of a log's schema YAML, of a search space or of one configuration, for editors."""
    from bfm.events.schema import EventSchema
    from bfm.sweep.space.spec import config_schema, json_schema

    schemas = {"log": EventSchema.model_json_schema, "space": json_schema, "train": config_schema}
    if kind not in schemas:
        raise UserError(f"no schema {kind!r}", key="KIND", fix=f"one of {', '.join(schemas)}")
    print(json.dumps(schemas[kind](), indent=1))
