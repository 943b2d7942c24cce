"""Laws: `bfm fit` on a sweep, a study or anyone's table of runs."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from bfm.cli.common import Json, chosen_metrics, number, show, whole
from bfm.errors import UserError

app = typer.Typer()


@app.command()
def fit(
    law: Annotated[str, typer.Argument(help="joint, isoflop, surface, hull, share, batch, negatives or agreement.")],
    runs: Annotated[str, typer.Argument(metavar="RUNS", help="Folder or URI of a sweep or study, or a table's files.")],
    columns: Annotated[
        str | None, typer.Option(help="Of a table: params=N,events=D,flops=C,loss=loss,metric=recall,...")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Row filter of a table: dataset == 'rw' and N > 1e6.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metrics, comma-separated, or all (default: nll, or the table's loss).")
    ] = None,
    curve: Annotated[str | None, typer.Option(help="isoflop: valley (two-term, the default) or quadratic.")] = None,
    objective: Annotated[str | None, typer.Option(help="surface: huber (the default) or asym_mae.")] = None,
    delta: Annotated[
        float | None, number("surface: where Huber's loss turns linear, in log loss (1e-3).", above=True)
    ] = None,
    reference_batch: Annotated[
        float | None, number("batch: B_ref of the 20 % overhead, in the table's unit of B.", above=True)
    ] = None,
    bootstrap: Annotated[int | None, whole("surface: bootstrap draws in place of the profile likelihood.")] = None,
    as_json: Json = False,
) -> None:
    """Fit a scaling law, with intervals.

    bfm fit joint runs/mine --metric nll,ndcg@10

    bfm fit surface published.csv --columns params=N,events=D,flops=C,loss=loss --json
    """
    from bfm.laws.fitting import law_named
    from bfm.report.law_text import law_text

    law_named(law)
    options = {
        "curve": curve, "objective": objective, "delta": delta, "reference_batch": reference_batch,
        "bootstrap": bootstrap,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    fits = _fits(law, runs, columns, where, metric, given)
    if len(fits) == 1:
        (only,) = fits.values()
        if isinstance(only, UserError):
            raise only
        show(only.as_dict(), as_json, lambda _: law_text(only))
        return
    if all(isinstance(found, UserError) for found in fits.values()):
        raise next(found for found in fits.values() if isinstance(found, UserError))
    _show_several(fits, as_json)


def _fits(
    law: str, runs: str, columns: str | None, where: str | None, metric: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Metric -> its fit, or the UserError that says why there is none."""
    from bfm.laws.fitting import fit_metrics, runs_of_sweep
    from bfm.laws.runs import Runs, from_table, parse_columns
    from bfm.report.study import law_rows
    from bfm.tables.find import is_table

    if columns is None:
        if is_table(runs):
            raise UserError("a table needs its columns named", key="--columns", fix="write params=N,events=D,loss=loss")
        if where is not None:
            raise UserError("filters rows of a table", key="--where", fix="leave it out, or give report/runs.parquet")
        rows, known = law_rows(runs, law)
        if not known:
            raise UserError("no row has a metric yet", file=runs, fix="let the sweep finish a rung")
        of_sweep = partial(runs_of_sweep, law, rows, source=runs)
        return fit_metrics(law, chosen_metrics(metric, known, known[:1]), of_sweep, **options)
    table = from_table(runs, parse_columns(columns), where)
    known = list(table.metrics)

    def of_table(name: str) -> Runs:
        # Laws that need no loss are fitted to tables without a metric, too.
        return table.fitting(name) if name in known else table

    return fit_metrics(law, chosen_metrics(metric, known, [table.metric]), of_table, **options)


def _show_several(fits: dict[str, Any], as_json: bool) -> None:
    from bfm.laws.compare import differences
    from bfm.laws.result import LawFit
    from bfm.report.law_text import by_reason, differences_text, law_text

    told = {name: found for name, found in fits.items() if isinstance(found, LawFit)}
    value = {
        "metrics": {
            name: found.as_dict() if isinstance(found, LawFit) else {"refused": str(found)}
            for name, found in fits.items()
        },
        "differences": [difference.as_dict() for difference in differences(told)],
    }
    reasons = by_reason((name, str(found)) for name, found in fits.items() if name not in told)
    refused = [f"not fitted for {metrics}: {reason}" for reason, metrics in reasons.items()]
    parts = [*(law_text(found) for found in told.values()), differences_text(told), *refused]
    text = "\n\n".join(filter(None, parts))
    show(value, as_json, lambda _: text)
