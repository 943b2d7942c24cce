"""Figures and tables of laws: planted numbers come out, what cannot be fitted is said, and studies are one page."""

from __future__ import annotations

import functools
import json
import math
import re

import numpy as np
import pytest

from bfm.errors import UserError
from bfm.events.repeats import rule_facts
from bfm.laws.result import Estimate
from bfm.report import study
from bfm.report.digits import estimate_text
from bfm.report.law_details import outlook
from bfm.report.law_figures import law_figures
from bfm.report.law_fits import sweep_laws, told
from bfm.report.law_sections import answer_table, answers, law_parts
from bfm.report.plots import Panel
from bfm.report.render import Table, finite
from bfm.report.sections import recipe_table
from bfm.sweep.ledger.state import SweepState
from tests.report import planted_laws as planted
from tests.report.planted import page_of, planted_sweep, state_of
from tests.report.test_report_page import data_of, parsed

ROWS = {
    "allocation": planted.allocation_rows,
    "embedder_share": planted.share_rows,
    "negatives": planted.negatives_rows,
    "batch": planted.batch_rows,
}


@functools.cache
def laws_of(axis: str):
    return sweep_laws(ROWS[axis](), axis)


def optima(axis: str, name: str) -> list[Estimate]:
    return [budget.optima[name] for budget in told(laws_of(axis), "joint")[0][1].budgets]


def figures_of(laws) -> dict[str, list[Panel]]:
    """The panels of each figure for its first metric."""
    return {figure.name: list(figure.variants[0].panels) for figure in law_figures(laws, {})}


def drawn(panels) -> str:
    return json.dumps(finite([vars(panel) for panel in panels]), ensure_ascii=False, allow_nan=False)


def said(laws) -> str:
    return "\n".join(f"{answer.question} by {answer.metrics}: {answer.text}" for answer in answers(laws))


def cells(table: Table) -> list[list[str]]:
    return [[cell.text for cell in line] for line in table.cells]


def numbers(laws) -> str:
    """All tables and remarks as text."""
    lines = []
    for part in law_parts(laws):
        lines += [part.heading, *part.remarks]
        for table in part.tables:
            lines += [table.caption, *("|".join(line) for line in cells(table))]
            lines += [cell.remark for line in table.cells for cell in line]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("axis", "names"),
    [
        ("allocation", ["law-params", "law-agreement", "law-outlook"]),
        ("embedder_share", ["law-share", "law-agreement"]),
        ("negatives", ["law-negatives", "law-agreement"]),
        ("batch", ["law-batch", "law-agreement"]),
    ],
)
def test_each_axis_has_its_figures(axis, names):
    figures = figures_of(laws_of(axis))
    assert list(figures) == names
    assert all("no optimum" not in drawn(panels) for panels in figures.values())
    first = drawn(figures[names[0]])
    # The law goes on to 10 times the largest C.
    tens = ("10\u00b9\u2075", "10\u00b9\u2078", "10\u00b9\u2079", "a row")
    labels = [f"N {size}" for size in ("100k", "400k", "1.6M")] if axis == "batch" else tens
    assert all(label in first for label in labels)
    # x = 0 has a place of its own on the log axes of s and K.
    assert ("square-open" in first) == (axis in ("embedder_share", "negatives"))
    assert ('"ticktext": ["0", ' in first) == (axis in ("embedder_share", "negatives"))
    assert ("exponent 0.617" in first) == (axis == "allocation")
    assert ("arXiv 2606.05257: 1.1 % to 3.7 %" in first) == (axis == "embedder_share")


def test_a_figure_has_a_variant_and_a_sentence_per_metric():
    (share, _) = law_figures(laws_of("embedder_share"), {})
    assert [one.metric for one in share.variants] == ["nll", "recall@10"]
    assert share.variants[0].said.startswith("best at 2.")
    assert share.variants[1].panels[0].title == "recall@10 \u2191"


def test_every_axis_of_a_joint_sweep_has_a_figure_of_runs_as_they_would_stand_at_the_best_of_the_others():
    rows = [row | {"metrics": {"nll": row["metrics"]["nll"]}} for row in planted_sweep(60)["rows"] if row["metrics"]]
    laws = [found for found in sweep_laws(rows, None) if found.law == "joint"]
    (figures, ((runs, fit),)) = law_figures(laws, {}), told(laws, "joint")
    assert [figure.name for figure in figures] == ["law-params", "law-share", "law-rate", "law-outlook"]
    assert figures[2].heading == "Learning rate"
    panel = figures[0].variants[0].panels[0]
    dots = [trace for trace in panel.traces if str(trace.get("name")).startswith("C = ")]
    adjusted = np.array(fit.details["axes"]["params"]["adjusted"])
    assert sorted(np.concatenate([trace["y"] for trace in dots])) == pytest.approx(sorted(adjusted))
    assert sum(len(trace["text"]) for trace in dots) == len(runs)
    # Without a bad rate the runs of a C lie on one curve.
    assert np.median(adjusted) < np.median(runs["loss"])
    assert "a trial" in drawn([panel])


def test_what_lies_beyond_the_largest_c_is_dashed_and_paler():
    laws = [found for found in laws_of("allocation") if found.law == "joint"]
    figures = figures_of(laws)
    for panel in (figures["law-params"][1], figures["law-outlook"][0]):
        solid, dashed = [trace for trace in panel.traces if trace["mode"] == "lines" and "fill" not in trace][:2]
        assert solid["x"][-1] == pytest.approx(max(planted.BUDGETS))
        assert dashed["x"][0] == pytest.approx(max(planted.BUDGETS))
        assert dashed["x"][-1] == pytest.approx(10 * max(planted.BUDGETS))
        assert (solid["line"]["dash"], dashed["line"]["dash"]) == ("solid", "dash")
        assert solid["opacity"] > dashed["opacity"]


def test_tables_hold_the_planted_numbers_beside_published_ones():
    share = numbers(laws_of("embedder_share"))
    for found in optima("embedder_share", "s_opt"):
        assert found.estimate == pytest.approx(planted.SHARE_OPT, rel=0.1)
        assert estimate_text(found, lambda value: f"{100 * value:.3g} %") in share
    assert "1.1 % to 3.7 %" in share
    assert optima("negatives", "K_opt")[0].estimate == pytest.approx(planted.K_AT_1E15, rel=0.1)
    assert "65k by recall@10" in numbers(laws_of("negatives"))
    sizes = numbers(laws_of("allocation"))
    assert ".617 by loss" in sizes
    assert optima("allocation", "N_opt")[2].estimate == pytest.approx(planted.planted_size(1e17), rel=0.05)
    assert "D/N at C = 10\u00b9\u2077" in sizes
    # Exponents and optima come first, what the form is made of last.
    assert sizes.index("N exponent") < sizes.index("N* at C") < sizes.index("\nalpha|")
    batch = numbers(laws_of("batch"))
    assert "B, twice the least events at N = 1.6M" in batch
    assert "570 sequences" in batch
    critical = told(laws_of("batch"), "batch")[0][1].parameters
    halving = [value.estimate for name, value in critical.items() if name.startswith("gain_halving[")]
    assert halving == pytest.approx(list(planted.GAIN_HALVING.values()), rel=0.15)


def test_what_is_foretold_stands_beside_the_floors():
    floors = {"popularity": {"nll": 4.2}, "co_occurrence": {"nll": 30.0, "recall@10": 0.5}}
    figures = {figure.name: figure for figure in law_figures(laws_of("allocation"), floors)}
    told_of = figures["law-outlook"].variants[0]
    assert told_of.said.endswith("; the strongest floor is popularity, 4.2.")
    names = {floor["name"].strip("\u2068\u2069"): floor["near"] for floor in told_of.panels[0].floors}
    assert names == {"popularity": True, "co-occurrence": False}
    low, high = told_of.panels[0].layout["yaxis"]["range"]
    assert low < 4.2 < high < 30.0


def test_the_outlook_is_the_planted_law_at_its_optimum_and_its_band_opens():
    ((_, fit), *_) = told(laws_of("allocation"), "joint")
    flops, last = outlook(fit)[-1]
    params = planted.planted_size(flops)
    events = flops / (planted.FLOPS_PER_PARAM_EVENT * params)
    truth = 1.7 + 400 / params**0.34 + 410 / events**0.28
    assert flops == pytest.approx(10 * max(planted.BUDGETS))
    assert last.low < truth < last.high
    first = outlook(fit)[0][1]
    assert (last.high - last.low) / last.estimate > (first.high - first.low) / first.estimate


def test_the_page_opens_with_a_sentence_per_axis_and_metric():
    sweep = {"rows": planted.share_rows(), "state": SweepState(), "baselines": {}}
    html = page_of(sweep, laws=laws_of("embedder_share"))
    marks = ("<bdi>Embedder share</bdi>", "best at 2.", "Rows: all 40 of 40 trials at 4 budgets, as designed. Noise: ")
    places = [html.index(mark) for mark in (*marks, 'id="frontier"', 'id="law-share"', 'id="trials"')]
    assert places == sorted(places)
    by = [(answer.question, answer.metrics) for answer in answers(laws_of("embedder_share"))]
    assert by == [("Embedder share", "nll"), ("Embedder share", "recall@10"), ("nll and ranking", "nll")]


def test_metrics_that_say_the_same_stand_in_one_sentence():
    rows = planted.share_rows()
    for row in rows:
        row["metrics"] = {name: row["metrics"]["nll"] for name in ("nll", "nll_again")}
    found = [answer for answer in answers(sweep_laws(rows, "embedder_share")) if answer.question == "Embedder share"]
    assert [answer.metrics for answer in found] == ["nll, nll_again"]


def test_one_table_says_what_a_recipe_takes_from_every_law():
    table = "\n".join("|".join(line) for line in cells(answer_table([(axis, laws_of(axis)) for axis in ROWS])))
    best = estimate_text(optima("embedder_share", "s_opt")[-1], lambda value: f"{100 * value:.3g} %")
    assert f"embedder_share|Embedder share|nll|best at {best} at C = 1e18, not told to move with C" in table
    assert re.search(r"at N = 1.6M B = \S+ \[.*\] costs 20 % more events and B = .* costs twice the least", table)
    assert re.search(r"recall@10 prefers the same runs at C = \S+ \(Spearman \+", table)
    assert "the best N grows as C^0.45 (95 %: 0.44 to 0.45)" in table


def test_metrics_whose_optima_are_apart_are_named():
    rows = planted.share_rows()
    for row in rows:
        # The ranking prefers ten times the share.
        row["metrics"]["recall@10"] = math.exp(-2 - 0.02 * math.log(max(row["embedder_share"], 1e-3) / 0.2) ** 2)
    laws = sweep_laws(rows, "embedder_share")
    assert "Apart by more than their intervals: nll and recall@10 in s opt at C = 1e+15, s opt" in numbers(laws)
    assert "Embedder share by recall@10: best at 2" in said(laws)


def test_a_budget_that_does_not_enclose_its_optimum_has_no_vertex_and_is_named():
    rows = planted.allocation_rows()
    top = planted.BUDGETS[-1]
    rows = [row for row in rows if row["rung_flops"] < top or row["params"] < 0.6 * planted.planted_size(top)]
    laws = sweep_laws(rows, "allocation")
    text = drawn(figures_of(laws)["law-params"])
    assert "no optimum at C = 10\u00b9\u2078" in text
    assert "C = 10\u00b9\u2078 (no optimum)" in text
    assert "bracketed at 3 of 4 budgets; not bracketed at C = 1e18: add larger N there." in said(laws)
    assert "no larger run near this C" in numbers(laws)


def test_shares_that_change_nothing_draw_no_power_law():
    rows = planted.share_rows(planted.BUDGETS[:3])
    for place, row in enumerate(rows):
        row["metrics"] = {"nll": 6.0 + 0.01 * math.sin(7.0 * place**1.5)}
    laws = sweep_laws(rows, "embedder_share")
    figures = figures_of(laws)
    assert list(figures) == ["law-share"], "without a best N nothing is foretold"
    assert "(no optimum)" in drawn(figures["law-share"])
    assert "s*" not in drawn(figures["law-share"])
    assert "not identifiable" in numbers(laws)
    assert "flat: from 0.2 % to 40 % the loss rises by at most 0.0" in said(laws)


def test_rows_that_no_law_fits_say_why_in_one_line():
    sweep = planted_sweep(4)
    laws = sweep_laws(sweep["rows"], None)
    assert [found.law for found in laws if found.fit is None]
    for found in laws:
        assert (found.fit is None) == bool(found.refused)
        assert "\n" not in found.refused
    html = page_of(sweep, laws=laws)
    parsed(html)
    assert '<section id="laws">' in html
    # Each reason once, with the metrics that it concerns.
    assert html.count("rows for") == 2, "in the answer and beside the law"
    assert "Not fitted for nll, recall@10, ndcg@10, mrr@10, coverage@10: " in html


def test_settings_and_metrics_of_any_name_are_shown_as_they_are():
    evil = "<b>'x\"& y"
    rows = planted_sweep(60)["rows"]
    for place, row in enumerate(rows):
        row["config"] = {**row["config"], f"{evil}_z": 10.0 ** (int(row["trial"][1:]) % 7)}
        nll = row["metrics"].get("nll")
        row["metrics"] = {"nll": nll, evil: nll + 0.01 * math.sin(place)} if nll else {}
    laws = sweep_laws(rows, None)
    html = page_of({"rows": rows, "state": state_of(rows), "baselines": {}}, laws=laws)
    parsed(html)
    assert "<b>'x" not in html
    assert "x&#34;&amp; y z</bdi>" in html
    panels = data_of(html)["figures"]["law-_b_x_y_z"][0]["panels"]
    assert panels[0]["layout"]["xaxis"]["title"]["text"] == "\u2068&lt;b&gt;'x\"&amp; y z\u2069"


def test_the_page_names_the_queries_that_were_scored():
    part = {"queries": 10_000, "users": 2_300, "basket_queries": 7}
    protocol = {"parts": {"validation": part, "test": part}, "ties": "half", "target_rule": "", "hash": ""}
    extra = {"protocol": rule_facts({"targets": 9, "seen": 1}, None) | protocol}
    spec = {"budget": {"ladder_flops": [], "total_flops": 1}, "data": {"evaluation_queries": 4000}}
    sweeps = [{"rows": [], "state": SweepState(spec=one), "baselines": {}} for one in (spec, None)]
    shown = [page_of(sweep, extra) for sweep in sweeps]
    assert "<dd><bdi>4,000 scored, the first of 10,000 of 2,300 users</bdi></dd>" in shown[0]
    assert shown[0].count("10,000 of 2,300 users, and 7 inside baskets") == 1
    assert shown[1].count("<dd><bdi>10,000 of 2,300 users, and 7 inside baskets") == 2


@pytest.mark.parametrize("axis", [None, "allocation", "embedder_share", "negatives", "batch"])
def test_no_row_is_no_law_and_no_fault(axis):
    assert sweep_laws([], axis) == []
    assert law_parts([]) == answers([]) == []


def test_a_recipe_is_shown_as_predicted_and_as_measured():
    predicted = {"estimate": 3.2, "low": 3.1, "high": None}
    recipe = {"flops": 1e19, "metric": "<nll>", "predicted": predicted, "check": None}
    assert cells(recipe_table(recipe, ())) == [["10\u00b9\u2079", "<nll>", "3.2", "[3.1, open]", "-", "not trained"]]
    check = recipe | {"measured": 3.15, "inside": True, "error": 0.01}
    shown = recipe_table(recipe | {"check": check}, ())
    assert cells(shown)[0][-2:] == ["3.150 \u00b1 0.010", "inside"]
    outside = recipe_table(recipe, [check | {"inside": False}])
    assert cells(outside)[0][-1] == "outside"
    assert len(cells(recipe_table(recipe, [check]))) == 1
    # A prediction that is open on both sides has no estimate in JSON.
    unknown = recipe | {"predicted": Estimate(3.2, -math.inf, math.inf).as_dict()}
    assert cells(recipe_table(unknown, ()))[0][2:4] == ["-", "[open, open]"]
    assert not recipe_table(None, ())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Estimate(0.5, 0.4, 0.6), "0.5 [0.4, 0.6]"),
        (Estimate(0.5, 0.4, math.inf), "0.5 [0.4, open]"),
        (Estimate(0.5, -math.inf, math.inf), "not identifiable"),
        (Estimate(2e233, 0.0, math.inf), "not identifiable"),
        (Estimate(0.5), "0.5"),
        (Estimate(-0.0013, -2.8e18, 2.8e18), "not identifiable"),
        (Estimate(3e4, 1e-5, 1e18), "not identifiable"),
        (Estimate(3e4, 2e4, 1e18), "3e+04 [2e+04, open]"),
        (Estimate(0.0, -0.2, 0.3), "0 [-0.2, 0.3]"),
        (Estimate(math.nan, 7.0, math.inf), "at least 7"),
        (Estimate(math.nan, 0.0, 7.0), "at most 7"),
        (Estimate(math.nan, -math.inf, math.inf), "not identifiable"),
    ],
)
def test_open_ends_are_said(value, text):
    assert estimate_text(value) == text


@pytest.fixture
def planted_study(tmp_path, monkeypatch):
    """A study of three sweeps: two begun, whose ledgers are stood in for, one not."""
    (tmp_path / "study.yaml").write_text("sweeps: [share, mixed, later]\n")
    states = {}
    for folder, axis, rows in (
        ("share", "embedder_share", planted.share_rows()),
        ("mixed", None, planted_sweep(4)["rows"]),
    ):
        spec = {"name": folder, "axis": axis, "budget": {"ladder_flops": [], "total_flops": 10**20}}
        states[str(tmp_path / folder)] = state_of(rows, spec=spec)
    monkeypatch.setattr("bfm.sweep.ledger.study.read_state", lambda store: states.get(store.uri, SweepState()))
    return tmp_path


def test_a_study_is_one_page_that_links_its_sweeps(planted_study):
    files = study.publish_study(str(planted_study))
    assert files[0].endswith("report/index.html")
    html = (planted_study / "report" / "index.html").read_text()
    page = parsed(html)
    assert len(page.ids) == len(set(page.ids))
    links = [link for link in page.fetched if link.endswith("index.html")]
    assert links == ["../share/report/index.html", "../mixed/report/index.html"]
    assert all((planted_study / "report" / link).resolve().is_file() for link in links)
    assert "not begun." in html
    assert "2 of 3 sweeps begun" in html
    assert '<bdi>nll, recall@10, ndcg@10, mrr@10, coverage@10</bdi></td><td class="wrap"><bdi>not fitted: ' in html
    assert "chapter-0-law-share" in data_of(html)["figures"]


def test_rows_of_a_study_are_those_of_the_axis(planted_study):
    rows, metrics = study.law_rows(str(planted_study), "share")
    assert metrics[:2] == ["nll", "recall@10"]
    assert {str(row["trial"]).split("/")[0] for row in rows} == {"share", "mixed"}
    only_mixed, _ = study.law_rows(str(planted_study), "negatives")
    assert {str(row["trial"])[0] for row in only_mixed} == {"t"}
    (planted_study / "study.yaml").write_text("sweeps: [share, later]\n")
    with pytest.raises(UserError, match=r"no sweep of the study measures batch; begun: share \(embedder_share\)"):
        study.law_rows(str(planted_study), "batch")
    (planted_study / "study.yaml").write_text("sweeps: none\n")
    with pytest.raises(UserError, match="is no list of folders"):
        study.law_rows(str(planted_study), "batch")
