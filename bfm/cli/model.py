"""One model: train, evaluate, export, predict; and what this machine can do."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bfm.cli.common import Json, ShardsOption, number, parse_ks, seed, show, whole
from bfm.errors import UserError
from bfm.units import format_flops

if TYPE_CHECKING:
    from bfm.events.shards import Shards
    from bfm.training.config import TrainConfig

app = typer.Typer()


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML of one configuration (params, embedder_share, learning_rate, ...).")
    ],
    shards: ShardsOption,
    out: Annotated[str, typer.Option("--out", help="Folder or URI for checkpoints and TensorBoard.")],
    flops: Annotated[float | None, number("C: model training FLOPs, e.g. 1e12.", above=True)] = None,
    minutes: Annotated[
        float | None, number("The same as minutes of training with one worker here, which is measured.", above=True)
    ] = None,
    seed: Annotated[int, seed()] = 0,
    queries: Annotated[int | None, whole("Validation queries to score (default: all).", 1)] = None,
    workers: Annotated[int, whole("More than one: Ray Train with DeepSpeed ZeRO.", 1)] = 1,
    zero_stage: Annotated[int, whole("ZeRO stage of several workers.", 0, 3)] = 1,
    micro_groups: Annotated[int, whole("Negative groups per micro-batch, at most.", 1)] = 1,
    softmax: Annotated[
        str,
        typer.Option(help="How the loss is computed: auto, reference, two_pass; in stage 2 one_pass, triton, sharded."),
    ] = "auto",
    gpus: Annotated[float, number("GPUs per worker.")] = 0.0,
    validations: Annotated[
        int, whole("Looks on the way, evenly spaced, at up to 1,000 validation queries; 0: none.")
    ] = 5,
    as_json: Json = False,
) -> None:
    """Train one configuration to a FLOP budget; run again with more FLOPs and it goes on from where it was.

    The weights of the validation with the lowest nll stay in trials/run/checkpoints/best of the folder.

    bfm train search_spaces/train.yaml --shards shards --minutes 5 --out run
    """
    import torch

    from bfm.doors.tensorboard import HPARAMS_METRICS, TrialWriter
    from bfm.events.protocol import Protocol
    from bfm.events.shards import Shards
    from bfm.files import Store
    from bfm.model.matmul_peak import matmul_peak
    from bfm.report.console import Display, step_words, validation_text
    from bfm.sweep.plan.machine import check_config
    from bfm.sweep.space.costs import Costs
    from bfm.sweep.space.tiers import tier_of_options
    from bfm.training.config import TrainConfig, log_defaults
    from bfm.training.records import Record, Validation
    from bfm.training.single import TRIAL, train_single
    from bfm.yaml import load_yaml

    if (flops is None) == (minutes is None) or (minutes is not None and workers > 1):
        fix = "give --flops 1e12, or, of one worker, --minutes 5"
        raise UserError("how long to train is told by one of two options", key="--flops", fix=fix)
    opened, values = Shards.open(shards), load_yaml(config)
    protocol = Protocol.load(opened)
    decided = log_defaults(values, protocol.filter_seen, opened.history_length)
    checked = TrainConfig.from_dict({**decided, **values}, file=str(config))
    tier = tier_of_options(workers, zero_stage, gpus, micro_groups, softmax)
    peak = matmul_peak("cuda" if gpus and torch.cuda.is_available() else "cpu")
    if flops is None:
        flops = _flops_in(60 * (minutes or 0.0), checked, opened)
    if workers == 1 or not os.environ.get("RAY_ADDRESS"):
        check_config(checked, Costs.on(opened, protocol, None), tier, flops, peak)
    Store(out).check_writable()
    writer = TrialWriter(f"{out}/tensorboard/{TRIAL}", checked.as_dict(), HPARAMS_METRICS)
    with Display("train") as display:

        def observe(record: Record) -> None:
            writer.take(record)
            if isinstance(record, Validation):
                display.say(validation_text(record))
            else:
                display.show(step_words(record, flops, peak), record.path_flops / flops)

        group = _run_group if workers > 1 else None
        row = train_single(
            checked,
            seed,
            shards,
            out,
            flops=flops,
            queries=queries,
            scaling=asdict(tier),
            validations=validations,
            observer=observe,
            run_group=group,
        )
        if group is not None:
            # Its workers have written them to TensorBoard.
            for validation in row.get("validations", ()):
                display.say(validation_text(Validation(**validation)))
    writer.row(row)
    writer.close()
    show(row, as_json, lambda row: _row_text(row, shards, queries, out))
    if row["status"] != "ok":
        raise SystemExit(1)


def _flops_in(training_s: float, config: TrainConfig, shards: Shards) -> float:
    """What one worker trains in so many seconds on this machine."""
    from bfm.training.single import MEASURE_S, measure_speed

    speed = measure_speed(config, shards, min(MEASURE_S, training_s))
    print(f"{format_flops(speed)} FLOP/s: {format_flops(speed * training_s)} FLOPs", file=sys.stderr)
    return speed * training_s


def _run_group(task: Mapping[str, Any], shards: str, storage: str) -> dict[str, Any]:
    from bfm.doors.tensorboard import HPARAMS_METRICS
    from ray_jobs.cluster_session import local_ray
    from ray_jobs.train import train_on_workers
    from ray_jobs.trial import Workplace

    print(f"{task['scaling']['workers']} workers; watch: tensorboard --logdir {storage}/tensorboard", file=sys.stderr)
    with local_ray(dashboard=True):
        return train_on_workers(
            task, shards, storage, make_observer=Workplace(shards, storage, HPARAMS_METRICS).observer
        )


def _row_text(row: dict[str, Any], shards: str, queries: int | None, out: str) -> str:
    from bfm.report.console import best_words, memorising_words
    from bfm.report.tables import evaluation_text
    from bfm.training.records import Validation
    from bfm.training.single import row_evaluation

    if row["status"] == "ok":
        text = [evaluation_text(row_evaluation(row, out, shards, queries)), f"cooled weights: {out}/{row['model']}"]
    else:
        text = [f"{row['status']} at {row['path_flops']:.3g} FLOPs"]
    if row.get("best"):
        text.append(f"best weights: {out}/{row['best_model']}, nll {best_words(Validation(**row['best']))}")
    if row.get("validations"):
        text.append(memorising_words(Validation(**row["validations"][-1])))
    return "\n".join(filter(None, text))


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder or URI of a checkpoint, e.g. run/trials/.../rung0-model.")],
    shards: ShardsOption,
    part: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    queries: Annotated[int | None, whole("The first so many queries (default: all).", 1)] = None,
    k: Annotated[str, typer.Option("--k", help="Lengths of lists, e.g. 5,10,50.")] = "10",
    sampled_negatives: Annotated[
        int | None, whole("Also rank each target against so many drawn items, under names of their own.", 1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Full-catalogue metrics of a checkpoint, beside the floors: popularity, co-occurrence, the personal history."""
    from bfm.report.tables import evaluation_text
    from bfm.training.single import evaluate_checkpoint

    found = evaluate_checkpoint(checkpoint, shards, part, queries, sampled_negatives, parse_ks(k))
    show(found, as_json, evaluation_text)


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
    show(
        made,
        as_json,
        lambda made: (
            f"{made['params']:,} weights, {made['items']:,} items ({made['catalogue']:,} in the catalogue, "
            f"{made['dtype']}), {made['bytes'] / 1e6:,.1f} MB" + f"\n{made['export']}"
        ),
    )


@app.command()
def predict(
    export: Annotated[str, typer.Argument(help="Folder that `bfm export` wrote.")],
    logs: Annotated[list[str], typer.Argument(help="Log files, globs, folders, URIs; columns as in training.")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file, one row per user; an older one is replaced.")],
    k: Annotated[int, whole("Items per user.", 1)] = 10,
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
    from bfm.files import Store
    from bfm.predictions import predict_log, summary_text
    from bfm.report.console import Display

    Store(out.absolute().parent).check_writable()
    with Display("predict") as display:
        summary = predict_log(export, logs, out, k=k, vectors=vectors, filter_seen=filter_seen, progress=display.show)
        display.say(summary_text(summary))
    show(summary, as_json, lambda summary: summary["predictions"])


@app.command()
def doctor(
    storage: Annotated[Path, typer.Option(help="Where sweeps will be kept.")] = Path(),
    loss: Annotated[bool, typer.Option("--loss", help="Compare the implementations of the loss instead.")] = False,
    as_json: Json = False,
) -> None:
    """What this machine can do and what is missing."""
    from bfm.sweep.plan.doctor import examine

    if loss:
        from bfm.objective.loss_check import check_losses, losses_text
        from bfm.training.engine import EngineFactory

        rows = check_losses(EngineFactory().device.type)
        show([row.as_dict() for row in rows], as_json, lambda _: losses_text(rows))
        return
    findings = examine(storage.absolute())
    lines = [
        f"{'ok ' if f.ok else 'BAD'}  {f.name:14}  {f.value}" + ("" if f.ok else f"  ({f.advice})") for f in findings
    ]
    show([finding.as_dict() for finding in findings], as_json, lambda _: "\n".join(lines))
    if not all(finding.ok for finding in findings):
        raise SystemExit(1)
