"""`bfm`: thin verbs over the rooms. stdout is data, stderr is talk; exit 0 done, 1 failed, 2 the input is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bfm.errors import CorruptError, DivergedError, UserError

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)
data = typer.Typer(help="Event logs: prepare, describe, synth.", no_args_is_help=True)
app.add_typer(data, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the file: budget.total_flops=1e13")
]
ShardsOption = Annotated[str, typer.Option("--shards", help="Prepared shard set (a folder or URI).")]


def main() -> None:
    """Run a verb; a user's mistake is one line and exit 2, a fault one line and exit 1. BFM_DEBUG=1 shows the trace."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _fail(error, 2)
    except (CorruptError, DivergedError, OSError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: Exception, code: int) -> None:
    import os

    if os.environ.get("BFM_DEBUG"):
        raise error
    line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    print(f"bfm: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(code)


def _print(value: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    print(json.dumps(value, indent=1) if as_json else text(value))


@data.command()
def prepare(
    schema: Annotated[str, typer.Argument(help="Schema YAML, or a built-in one: complete_journey, online_retail, ...")],
    logs: Annotated[
        list[str] | None, typer.Argument(help="Parquet, CSV or JSON-lines files, globs, folders, URIs.")
    ] = None,
    out: Annotated[str, typer.Option("--out", help="Folder or URI of the shard set.")] = "shards",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing shard set.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the shuffles (default: the schema's).")] = None,
    cpus: Annotated[int | None, typer.Option(help="Cores to use (default: all).")] = None,
    as_json: Json = False,
) -> None:
    """Clean a log, fit its fields, split it and write memory-mapped shards, on Ray Data."""
    from bfm.report.console import Display
    from ray_jobs.prepare import prepare_shards

    with Display("data") as display:
        manifest = prepare_shards(
            schema, logs or [], out, seed=seed, overwrite=overwrite, num_cpus=cpus, progress=display.show
        )
    summary = {
        "shards": out,
        "rows": manifest.rows_read,
        "events": manifest.events,
        "users": manifest.users,
        "items": manifest.items,
        "catalogue": manifest.catalogue,
        "quarantined": dict(manifest.rows_quarantined),
    }
    _print(summary, as_json, _prepared_text)


def _prepared_text(summary: dict[str, Any]) -> str:
    quarantined = summary["quarantined"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in quarantined.items()) or "none"
    return (
        f"{summary['events']:,} events of {summary['users']:,} users over {summary['items']:,} items "
        f"({summary['catalogue']:,} in the catalogue); quarantined: {reasons}\n{summary['shards']}"
    )


@data.command()
def describe(shards: Annotated[str, typer.Argument(help="Prepared shard set.")], as_json: Json = False) -> None:
    """Say what a person wants to know first about a prepared log."""
    from bfm.events.describe import describe as run
    from bfm.events.describe import format_description
    from bfm.events.shards import Shards

    _print(run(Shards.open(shards)), as_json, format_description)


@data.command()
def synth(
    out: Annotated[Path, typer.Argument(help="New folder for the log, its schema and truth.json.")],
    events: Annotated[str, typer.Option(help="Number of events, e.g. 1e6.")] = "1e6",
    users: Annotated[str, typer.Option(help="Number of users.")] = "1e4",
    items: Annotated[str, typer.Option(help="Number of items.")] = "1e4",
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Write a synthetic log with known structure and its Bayes-optimal NLL and recall@10."""
    from bfm.events.synth import write_synthetic
    from bfm.report.console import Display
    from bfm.units import format_count, parse_count

    counts = {name: parse_count(text, key=f"--{name}") for name, text in (("events", events), ("users", users))}
    with Display("synth") as display:
        truth = write_synthetic(
            out,
            events=counts["events"],
            users=counts["users"],
            items=parse_count(items, key="--items"),
            seed=seed,
            progress=lambda done: display.show(f"{format_count(done)} events", done / counts["events"]),
        )
    _print(truth, as_json, lambda value: "\n".join(f"{name}: {entry}" for name, entry in value.items()) + f"\n{out}")


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML of one configuration (params, embedder_share, learning_rate, ...).")
    ],
    shards: ShardsOption,
    flops: Annotated[str, typer.Option(help="C: model training FLOPs, e.g. 1e12.")],
    out: Annotated[str, typer.Option("--out", help="Folder or URI for checkpoints and TensorBoard.")],
    seed: int = 0,
    queries: Annotated[int | None, typer.Option(help="Validation queries to score (default: all).")] = None,
    workers: Annotated[int, typer.Option(help="More than one: Ray Train with DeepSpeed ZeRO.")] = 1,
    zero_stage: Annotated[int, typer.Option(help="ZeRO stage of several workers.")] = 1,
    micro_groups: Annotated[int, typer.Option(help="Negative groups per micro-batch, at most.")] = 1,
    softmax: Annotated[
        str,
        typer.Option(help="How the loss is computed: auto, reference, two_pass; in stage 2 one_pass, triton, sharded."),
    ] = "auto",
    gpus: Annotated[float, typer.Option(help="GPUs per worker.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Train one configuration to a FLOP budget; run again with more FLOPs and it goes on from where it was."""
    from bfm.report.console import Display, step_words
    from bfm.report.tensorboard import HPARAMS_METRICS, trial_writer
    from bfm.training.config import TrainConfig
    from bfm.training.loop import StepRecord
    from bfm.training.peak import matmul_peak
    from bfm.training.single import TRIAL, train_single
    from bfm.units import parse_number
    from bfm.yaml import load_yaml

    limit_flops = parse_number(flops, key="--flops")
    checked = TrainConfig.from_dict(load_yaml(config), file=str(config))
    writer = trial_writer(f"{out}/tensorboard/{TRIAL}", checked.as_dict(), HPARAMS_METRICS)
    peak = matmul_peak("cuda" if gpus else "cpu")
    with Display("train") as display:

        def observe(record: StepRecord) -> None:
            writer.step(record)
            display.show(step_words(record, limit_flops, peak), record.path_flops / limit_flops)

        scaling = {
            "workers": workers,
            "zero_stage": zero_stage,
            "micro_groups": micro_groups,
            "softmax": softmax,
            "cpus": 1.0,
            "gpus": gpus,
        }
        group = _run_group if workers > 1 else None
        row = train_single(
            checked,
            seed,
            shards,
            out,
            flops=limit_flops,
            queries=queries,
            scaling=scaling,
            observer=observe,
            run_group=group,
        )
    writer.row(row)
    writer.close()
    _print(row, as_json, lambda row: _row_text(row, shards, queries))
    if row["status"] != "ok":
        raise SystemExit(1)


def _run_group(task: Mapping[str, Any], shards: str, storage: str) -> dict[str, Any]:
    from bfm.report.tensorboard import HPARAMS_METRICS
    from ray_jobs.cluster_session import local_ray
    from ray_jobs.train import train_on_workers
    from ray_jobs.trial import Workplace

    print(f"{task['scaling']['workers']} workers; watch: tensorboard --logdir {storage}/tensorboard", file=sys.stderr)
    with local_ray(dashboard=True):
        return train_on_workers(
            task, shards, storage, make_observer=Workplace(shards, storage, HPARAMS_METRICS).observer
        )


def _row_text(row: dict[str, Any], shards: str, queries: int | None) -> str:
    from bfm.report.tables import evaluation_text
    from bfm.training.single import row_evaluation

    if row["status"] != "ok":
        return f"{row['status']} at {row['path_flops']:.3g} FLOPs"
    return f"{evaluation_text(row_evaluation(row, shards, queries))}\n{row['model']}"


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder or URI of a checkpoint, e.g. run/trials/.../rung0-model.")],
    shards: ShardsOption,
    part: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    queries: Annotated[int | None, typer.Option(help="The first so many queries (default: all).")] = None,
    sampled_negatives: Annotated[
        int | None, typer.Option(help="Also rank each target against so many drawn items, under names of their own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Full-catalogue metrics of a checkpoint, beside the popularity and co-occurrence floors."""
    from bfm.report.tables import evaluation_text
    from bfm.training.single import evaluate_checkpoint

    _print(evaluate_checkpoint(checkpoint, shards, part, queries, sampled_negatives), as_json, evaluation_text)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or URI of a checkpoint, e.g. run/trials/.../rung0-model.")],
    shards: ShardsOption,
    out: Annotated[Path, typer.Option("--out", help="New folder of the export; appears whole or not at all.")],
    catalogue_dtype: Annotated[
        str, typer.Option(help="float32: ranks as evaluation does; bfloat16: half the room.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Write a trained model as a folder that predicts on its own, without Ray, DeepSpeed or the shards."""
    from bfm.training.export import export_checkpoint

    made = export_checkpoint(checkpoint, shards, out, catalogue_dtype)
    _print(
        made,
        as_json,
        lambda made: (
            f"{made['params']:,} weights, {made['items']:,} items ({made['catalogue']:,} in the catalogue, "
            f"{made['dtype']}), {made['bytes'] / 1e6:,.1f} MB\n{made['export']}"
        ),
    )


@app.command()
def predict(
    export: Annotated[str, typer.Argument(help="Folder that `bfm export` wrote.")],
    logs: Annotated[list[str], typer.Argument(help="Log files, globs, folders, URIs; columns as in training.")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file, one row per user; an older one is replaced.")],
    k: Annotated[int, typer.Option("--k", help="Items per user.")] = 10,
    vectors: Annotated[bool, typer.Option("--vectors", help="Also write user vectors.")] = False,
    filter_seen: Annotated[
        bool | None, typer.Option("--filter-seen/--keep-seen", help="Items of the history (default: as evaluated).")
    ] = None,
    as_json: Json = False,
) -> None:
    """The top k items of the catalogue for every user of a log: what comes next, at a later time.

    Users are in no particular order. A user without any usable row has empty lists. Items that the export does not
    know count in histories, embedded from their fields in the log, and are never recommended.
    """
    from bfm.report.console import Display
    from bfm.report.predictions import predict_log, summary_text

    with Display("predict") as display:
        summary = predict_log(export, logs, out, k=k, vectors=vectors, filter_seen=filter_seen, progress=display.show)
        display.say(summary_text(summary))
    _print(summary, as_json, lambda summary: summary["predictions"])


@app.command()
def plan(
    space: Annotated[Path, typer.Argument(help="Search-space YAML.")],
    overrides: Overrides = None,
    shards: Annotated[str | None, typer.Option(help="Override data.shards.")] = None,
    probe_seconds: Annotated[float, typer.Option(help="How long to measure this machine; 0: no times.")] = 20.0,
    as_json: Json = False,
) -> None:
    """What a sweep would train and cost, and what is infeasible and why. Trains nothing but the probe."""
    from bfm.events.protocol import Protocol
    from bfm.events.shards import Shards
    from bfm.sweep.costs import Costs, LogFacts
    from bfm.sweep.plan import plan as make_plan
    from bfm.sweep.plan import render
    from bfm.sweep.spec import resolve
    from bfm.training.single import measure_speed

    spec = resolve(space, _with_shards(overrides, shards))
    opened = Shards.open(spec.shards)
    costs = Costs(LogFacts.from_shards(opened, Protocol.load(opened), spec.evaluation_queries))
    measure = (lambda config, seconds: measure_speed(config, opened, seconds)) if probe_seconds > 0 else None
    made = make_plan(spec, costs, measure, probe_seconds)
    _print(made.as_dict(), as_json, lambda _: render(made))


@app.command()
def sweep(
    space: Annotated[Path, typer.Argument(help="Search-space YAML.")],
    storage: Annotated[str, typer.Option(help="Folder or URI under which sweeps are kept.")] = "runs",
    name: Annotated[str | None, typer.Option(help="Name of the sweep (default: the file's).")] = None,
    resume: Annotated[str, typer.Option(help="auto, never or must.")] = "auto",
    overrides: Overrides = None,
    shards: Annotated[str | None, typer.Option(help="Override data.shards.")] = None,
) -> None:
    """Run a sweep on this machine, or on the cluster that RAY_ADDRESS names; resumable at any point."""
    from ray_jobs.sweep import sweep_verb

    raise SystemExit(sweep_verb(space, storage, name=name, resume=resume, overrides=_with_shards(overrides, shards)))


@app.command()
def status(
    sweep_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URI of a sweep.")], as_json: Json = False
) -> None:
    """Where a sweep stands, from its ledger alone (running or not)."""
    from bfm.report.sweep_view import read_sweep, status_text

    view = read_sweep(sweep_dir)
    _print(view.status, as_json, lambda _: status_text(view))


@app.command()
def report(
    sweep_dir: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URI of a sweep.")],
    png: Annotated[bool, typer.Option("--png", help="Also write figures/overview.png.")] = False,
    as_json: Json = False,
) -> None:
    """Write report/index.html and runs.parquet of a sweep, and print its frontier."""
    from bfm.report.sweep_view import publish_report, read_sweep, report_text

    view = read_sweep(sweep_dir)
    files = publish_report(view, overview=png)
    _print({"frontier": view.frontiers(), "files": files}, as_json, lambda _: report_text(view, files))


@app.command()
def doctor(
    storage: Annotated[Path, typer.Option(help="Where sweeps will be kept.")] = Path(),
    loss: Annotated[bool, typer.Option("--loss", help="Compare the implementations of the loss instead.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine can do and what is missing."""
    from bfm.report.doctor import examine

    if loss:
        from bfm.report.loss_check import check_losses, losses_text
        from bfm.training.plain import PlainFactory

        rows = check_losses(PlainFactory().device.type)
        _print([row.as_dict() for row in rows], as_json, lambda _: losses_text(rows))
        return
    findings = examine(storage.absolute())
    lines = [
        f"{'ok ' if f.ok else 'BAD'}  {f.name:14}  {f.value}" + ("" if f.ok else f"  ({f.advice})") for f in findings
    ]
    _print([finding.as_dict() for finding in findings], as_json, lambda _: "\n".join(lines))
    if not all(finding.ok for finding in findings):
        raise SystemExit(1)


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="log or space.")]) -> None:
    """The JSON schema of a log's schema YAML or of a search space, for editors."""
    from bfm.events.schema import json_schema as log_schema
    from bfm.sweep.spec import json_schema as space_schema

    schemas = {"log": log_schema, "space": space_schema}
    if kind not in schemas:
        raise UserError(f"no schema {kind!r}", key="KIND", fix="one of log, space")
    print(json.dumps(schemas[kind](), indent=1))


def _with_shards(overrides: list[str] | None, shards: str | None) -> list[str]:
    return [*(overrides or []), *([f"data.shards={shards}"] if shards else [])]
