"""`bfm data`: event logs in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bfm.cli.common import Json, number, seed, show, whole

app = typer.Typer(help="Event logs: prepare, describe, synth.", no_args_is_help=True)


@app.command()
def prepare(
    schema: Annotated[str, typer.Argument(help="Schema YAML, or a built-in one: complete_journey, online_retail, ...")],
    logs: Annotated[
        list[str] | None, typer.Argument(help="Parquet, CSV or JSON-lines files, globs, folders, URIs.")
    ] = None,
    out: Annotated[str, typer.Option("--out", help="Folder or URI of the shard set.")] = "shards",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing shard set.")] = False,
    seed: Annotated[int | None, seed("Seed of the shuffles (default: the schema's).")] = None,
    cpus: Annotated[int | None, whole("Cores to use (default: all).", 1)] = None,
    as_json: Json = False,
) -> None:
    """Clean a log, fit its fields, split it and write memory-mapped shards."""
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
        **{name: manifest.checks.get(name, {}) for name in _TOLD},
        "seen_items": manifest.checks["seen_items"],
        "time_range": list(manifest.time_range),
        "has_clock": manifest.has_clock,
    }
    show(summary, as_json, _prepared_text)


_TOLD = (
    *("lines", "files", "repairs", "read_as", "left_out", "cuts"),
    *("items_without_row", "item_keys_that_never_meet", "item_rows_unreadable"),
)


def _prepared_text(summary: dict[str, Any]) -> str:
    from bfm.events.account import account_lines
    from bfm.events.describe import cut_lines, time_text

    lines = [
        f"{summary['events']:,} events of {summary['users']:,} users over {summary['items']:,} items "
        f"({summary['catalogue']:,} in the catalogue)",
        f"times {time_text(summary['time_range'], summary['has_clock'])}",
        f"seen items {summary['seen_items']}",
        *(f"cut: {line}" for line in cut_lines(summary["cuts"])),
        *account_lines(summary["rows"], summary["events"], summary["quarantined"], summary),
        summary["shards"],
    ]
    return "\n".join(lines)


@app.command()
def describe(shards: Annotated[str, typer.Argument(help="Prepared shard set.")], as_json: Json = False) -> None:
    """Say what a person wants to know first about a prepared log."""
    from bfm.events.describe import describe as run
    from bfm.events.describe import format_description
    from bfm.events.shards import Shards

    show(run(Shards.open(shards)), as_json, format_description)


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="New folder for the log, its schema and truth.json.")],
    events: Annotated[int, whole("Number of events, e.g. 1e6.", 1)] = 1_000_000,
    users: Annotated[int, whole("Number of users.", 1)] = 10_000,
    items: Annotated[int, whole("Number of items.", 1)] = 10_000,
    repeat: Annotated[float, number("Share of purchases that repeat, where an aisle is known.", high=1)] = 0.3,
    basket: Annotated[float, number("Mean size of baskets, before their law is cut; 1: none.", 1)] = 10.0,
    seed: Annotated[int, seed()] = 0,
    as_json: Json = False,
) -> None:
    """Write a synthetic log with known structure and its Bayes-optimal NLL and recall@10."""
    from bfm.report.console import Display
    from bfm.synth.log import write_synthetic
    from bfm.units import format_count

    with Display("synth") as display:
        truth = write_synthetic(
            out,
            events=events,
            users=users,
            items=items,
            seed=seed,
            repeat=repeat,
            basket=basket,
            progress=lambda done: display.show(f"{format_count(done)} events", done / events),
        )
    show(truth, as_json, lambda value: "\n".join(f"{name}: {entry}" for name, entry in value.items()) + f"\n{out}")
