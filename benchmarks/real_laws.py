"""What real sweeps said: the laws of each study, per metric, and a summary of the ledgers they were read off.

Run with `python benchmarks/real_laws.py NAME=STUDY ...` (folders of `bfm study`); writes results/real_laws.md and, of
every study, results/real_laws_NAME.csv with one line per result.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
from collections.abc import Iterable

from common import RESULTS, machine, publish

from bfm.laws.frontier import Row, rung_rows
from bfm.report.digits import estimate_text
from bfm.report.law_fits import Fitted
from bfm.report.study import Chapter, chapters, read_study
from bfm.sweep.recipe.verdicts import check_text

METRICS = ("nll", "recall@10", "ndcg@10", "mrr@10")
COLUMNS = ("sweep", "trial", "seed", "rung_flops", "params", "embedder_share", "events", "batch_events", "negatives")


def summary(study: str) -> str:
    """One line per rung row of a study, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *METRICS])
    for sweep in read_study(study):
        for row in rung_rows(sweep.rows):
            writer.writerow([sweep.folder, *_cells(row)])
    return text.getvalue()


def _cells(row: Row) -> list[str]:
    numbers = [row[name] for name in ("rung_flops", "params", "embedder_share", "events", "batch_events")]
    metrics = [row["metrics"].get(name) for name in METRICS]
    known = [*numbers, row["config"].get("negatives", 0), *metrics]
    return [row["trial"], str(row["seed"]), *("" if value is None else f"{value:.6g}" for value in known)]


def laws(chapter: Chapter) -> Iterable[str]:
    """Lines of a table: every law of an axis on every metric."""
    for found in chapter.laws:
        if found.law != "agreement":
            yield f"| {chapter.title} | {found.law} | {found.metric} | {_said(found)} |"


def _said(found: Fitted) -> str:
    if found.fit is None:
        return f"refused: {found.refused}"
    told = [
        f"{name} {estimate_text(value, '{:.4g}'.format)}"
        for name, value in found.fit.parameters.items()
        if value.is_known
    ]
    for budget in found.fit.budgets:
        optima = [
            f"{name} {estimate_text(value, '{:.4g}'.format)}" for name, value in budget.optima.items() if value.is_known
        ]
        if optima:
            told.append(f"at {budget.flops:.3g}: {', '.join(optima)}")
    return f"{found.fit.runs} runs; {'; '.join(told) or 'nothing identifiable'}".replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="+", metavar="NAME=STUDY")
    lines = [
        "# Laws on real sweeps",
        "",
        "The laptop spaces (`search_spaces/*_small.yaml`), all sweeps of one axis fitted together; 95 % intervals;",
        "what is not identifiable is left out.",
        f"Written by `python benchmarks/real_laws.py` on {datetime.date.today()}.",
    ]
    for name, _, study in (text.partition("=") for text in parser.parse_args().studies):
        told = chapters(read_study(study))
        lines += ["", f"## {name}", "", "| axis | law | metric | what the runs say |", "|---|---|---|---|"]
        lines += [line for chapter in told for line in laws(chapter)]
        sweeps = [sweep for chapter in told for sweep in chapter.sweeps]
        lines += ["", *[check_text(check) for sweep in sweeps for check in sweep.state.checks]]
        (RESULTS / f"real_laws_{name}.csv").write_text(summary(study))
    publish("real_laws", "\n".join([*lines, "", machine("torch", "ray", "scipy"), ""]))


if __name__ == "__main__":
    main()
