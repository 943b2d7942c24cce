"""`bfm predict`: an export and a raw log to a Parquet file of predictions, and what is said about it.

Enters: the folder of an export, log files. Leaves: the file, whole or not at all, and counts of all that was read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bfm.errors import UserError
from bfm.events.histories import PART_ROWS, Histories
from bfm.ranking.predictor import Predictor

# Shares of the progress bar.
_READING = 0.4


def predict_log(
    export: str,
    logs: list[str],
    out: Path,
    *,
    k: int = 10,
    vectors: bool = False,
    filter_seen: bool | None = None,
    progress: Callable[[str, float], None] = lambda words, share: None,
    part_rows: int = PART_ROWS,
) -> dict[str, Any]:
    """Predict for every user of a log (see Predictor.write for the file). Memory does not grow with the log.

    Args:
        export: folder of an export.
        logs: files, folders, globs or URIs.
        out: the Parquet file; scratch files lie in a hidden folder beside it.
        k, vectors, filter_seen: as in Predictor.write.
        progress: called with words and the share that is done.
        part_rows: events held in memory at once, about.

    Returns:
        Counts of rows, users and items.

    Raises:
        UserError: the export is absent or of another version, k is too large, a file or column of the log is missing,
            or no row is usable.
        CorruptError: the export is damaged.
    """
    if out.is_dir():
        raise UserError("is a folder", file=str(out), key="--out", fix="name a file, e.g. predictions.parquet")
    predictor = Predictor.load(export, "cuda" if torch.cuda.is_available() else "cpu")
    predictor.check_k(k)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.predicting-", dir=out.parent) as folder:
        spill, made = Path(folder, "spill"), Path(folder, "predictions")
        spill.mkdir()
        histories = Histories(
            predictor.encoding,
            logs,
            spill,
            progress=lambda share: progress("reading", _READING * share),
            part_rows=part_rows,
        )
        predictor.add_items(histories.new_item_arrays())

        def show(users: int, events: int) -> None:
            progress(f"{users:,} users", _READING + (1 - _READING) * events / histories.rows)

        counts = predictor.write(histories.parts(), made, k=k, vectors=vectors, filter_seen=filter_seen, progress=show)
        os.replace(made, out)
    return {"predictions": str(out), **counts, **_read_counts(histories)}


def _read_counts(histories: Histories) -> dict[str, Any]:
    return {
        "rows": histories.rows,
        "unusable": dict(sorted(histories.unusable.items())),
        "repairs": {f"{name}: {fault}": count for (name, fault), count in sorted(histories.repairs.items())},
        "cuts": dict(sorted(histories.cuts.items())),
        "duplicates": histories.duplicates,
        "new_items": histories.new_items,
        "new_item_events": histories.new_item_events,
    }


def summary_text(summary: dict[str, Any]) -> str:
    """What was read and written, in lines; only what happened is said."""
    lines = [f"{summary['users']:,} users from {summary['rows']:,} rows"]
    if summary["unusable"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary["unusable"].items())
        lines.append(f"rows left out: {reasons}")
    if summary["duplicates"]:
        lines.append(f"repeated rows left out: {summary['duplicates']:,}")
    if summary["repairs"]:
        faults = ", ".join(f"{fault} {count:,}" for fault, count in summary["repairs"].items())
        lines.append(f"field values taken as missing: {faults}")
    if summary["cuts"]:
        cuts = ", ".join(f"{name} {count:,}" for name, count in summary["cuts"].items())
        lines.append(f"texts and lists cut to the length kept in training: {cuts}")
    if summary["users_without_event"]:
        lines.append(f"users without a usable row, with empty lists: {summary['users_without_event']:,}")
    if summary["new_items"]:
        lines.append(
            f"items the export does not know: {summary['new_items']:,} in {summary['new_item_events']:,} events, "
            "embedded from their fields in the log and never recommended"
        )
    if summary["short_lists"]:
        lines.append(f"users with fewer unseen items than asked for: {summary['short_lists']:,}")
    return "\n".join(lines)
