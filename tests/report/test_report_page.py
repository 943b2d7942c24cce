"""The page of a sweep: whole, self-contained, escaped, and unbroken by few or bad rows."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest

from bfm.errors import UserError
from bfm.events.fields import FittedField
from bfm.events.manifest import Manifest
from bfm.events.repeats import rule_facts
from bfm.files import Store
from bfm.laws.frontier import Results, frontier
from bfm.report.digits import power_text
from bfm.report.law_fits import sweep_laws
from bfm.report.plots import log_ticks, plain, short, value_window
from bfm.report.sweep_data import varied_choices, varied_fields
from bfm.report.sweep_report import publish_report
from bfm.report.sweep_view import SweepView
from bfm.report.tables import behind_text, trials_in_order
from bfm.sweep.ledger.state import SweepState
from bfm.units import format_count
from tests.report import planted_laws
from tests.report.planted import compare, diverged, page_of, planted_sweep

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Balanced(HTMLParser):
    """Fails on tags that do not nest; collects ids and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attributes):
        self._note(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._note(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.fetched.append(value)


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    return parser


def data_of(html: str) -> dict:
    """What the page's figures are drawn from."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_report_of_a_sweep_is_whole_and_self_contained(sweep):
    html = page_of(sweep)
    page = parsed(html)
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(page.ids)
    order = ["best", "frontier", "results", "curves", "scatter", "trials", "baselines", "failures", "provenance"]
    assert [name for name in page.ids if name in order] == order
    # Every trial has its line, at its highest rung; those that have come furthest stand first.
    rows = [sweep["rows"][place] for place in data_of(html)["sweep"]["trials"]]
    assert sorted(row["trial"] for row in rows) == [f"t{trial:03d}" for trial in range(24)]
    assert [row["rung"] for row in rows[:4]] == [2] * 4


def test_figures_are_drawn_from_what_the_rows_hold(sweep):
    told = data_of(page_of(sweep, compare=compare))["sweep"]
    columns = {column["name"]: column for column in told["columns"]}
    assert columns["nll"]["value"] == [row["metrics"].get("nll") for row in sweep["rows"]]
    assert columns["N"]["text"][0] == format_count(sweep["rows"][0]["params"])
    assert sum(told["failed"]) == 2
    for metric, facts in told["metrics"].items():
        points = frontier(sweep["rows"], metric)
        assert [point["value"] for point in facts["frontier"]] == [point.value for point in points]
        assert [sweep["rows"][point["row"]] for point in facts["frontier"]] == [point.row for point in points]
        low, high = facts["axis"]["range"]
        assert all(low < point["value"] < high for point in facts["frontier"])
    assert told["metrics"]["nll"]["frontier"][1]["change"].startswith("-")
    assert "above the strongest floor, popularity 8.91: -" in told["metrics"]["nll"]["said"]
    assert {floor["name"] for floor in told["metrics"]["recall@10"]["floors"]} == {
        short("popularity"),
        short("co-occurrence"),
    }


def test_the_first_sentence_says_what_the_space_searches(sweep):
    """Not what differs: the rate of a trial may follow the rule."""
    assert "learning_rate" in varied_fields(sweep["rows"])
    assert "M, searching embedder share and groups per step." in page_of(sweep)


def test_every_dot_of_a_figure_against_c_lies_on_its_axis(sweep):
    """With two rungs half a decade apart the dots of a rung lie wide, and so do the ranking metrics of one."""
    near = [row | {"rung_flops": (1e10, 3e10)[row["rung"]]} for row in sweep["rows"] if row["rung"] < 2]
    rows = planted_laws.share_rows(budgets=(1e15, 3e15))
    for row in rows:
        row["metrics"] |= {name: row["metrics"]["recall@10"] for name in ("recall@5", "ndcg@10", "mrr@10")}
    laws = [found for found in sweep_laws(rows, "embedder_share") if found.law == "agreement"]
    data = data_of(page_of({"rows": near, "state": SweepState(), "baselines": {}}, laws=laws))
    (variant,) = data["figures"]["law-agreement"]
    shown = [(data["sweep"]["rungs"]["axis"], data["sweep"]["fanned"])]
    shown += [(panel["layout"]["xaxis"], trace["x"]) for panel in variant["panels"] for trace in panel["traces"]]
    assert len(shown) == 1 + 4
    for axis, places in shown:
        low, high = axis["range"]
        assert all(low < math.log10(at) < high for at in places)


def test_a_sweep_below_a_floor_is_called_so_in_the_first_lines(sweep):
    sweep["baselines"]["co_occurrence"]["coverage@10"] = 0.01
    assert "The best of the sweep is above every floor in nll" in page_of(sweep)
    sweep["baselines"]["personal"] = {"nll": 1.0, "recall@10": 0.9}
    html = page_of(sweep)
    lede = html[html.index('class="lede"') :][:900]
    assert "The best of the sweep is BELOW the strongest floor in nll (" in lede
    assert "personal 0.9) and above it in ndcg@10 (" in lede
    assert re.search(r'<div class="note loss">below the strongest floor, personal 1: \+', html)
    assert re.search(r'<div class="note gain">above the strongest floor, co-occurrence 0.071: \+', html)


def test_the_page_tells_differences_on_the_same_queries(sweep):
    html = page_of(sweep, compare=compare)
    point = frontier(sweep["rows"], "nll", compare)[2]
    change, error = point.change.value, point.change.error
    remark = (
        f"{point.row['trial']}; N {format_count(point.row['params'])}; {change:+.4f} \u00b1 {error:.4f} against the"
    )
    assert f"<small>{remark} rung below; {point.value - 8.91:.4g} to popularity; within error: t" in html
    assert "<bdi>strongest floor</bdi>" in html
    (nll,) = (column for column in data_of(html)["sweep"]["columns"] if column["name"] == "nll")
    second = trials_in_order(Results(sweep["rows"]))[1]
    assert nll["remark"][sweep["rows"].index(second)] == behind_text(second, point.row, "nll", compare)
    assert "~</small>" not in html
    assert "~</small>" in page_of(sweep)


def test_the_page_is_a_function_of_its_input():
    assert page_of(planted_sweep(6)) == page_of(planted_sweep(6))


def test_everything_from_outside_is_escaped():
    sweep = planted_sweep(6)
    evil = "<script>alert('x')</script>\"&"
    sweep["state"].spec["name"] = evil
    sweep["state"].losses = [{"trial": evil, "rung": 1, "reason": evil, "charged_flops": 1}]
    sweep["state"].rejected = Counter({evil: 3})
    sweep["rows"][0] = sweep["rows"][0] | {"trial": evil, "device": evil, "engine": evil}
    best = min((row for row in sweep["rows"] if row["rung"] == 2), key=lambda row: row["metrics"]["nll"])
    best["trial"] = evil
    counts = {"users": 1, "events": 2, "items": 3, "catalogue": 3, "rows_quarantined": {evil: 1}}
    field = FittedField(evil, "item", "time")
    manifest = Manifest(name=evil, seed=0, has_clock=False, fields=(field,), split={"by": evil}, **counts).as_dict()
    protocol = rule_facts({"targets": 9, "seen": 1}, None) | dict.fromkeys(("hash", "ties", "target_rule"), evil)
    protocol["parts"] = {evil: {"queries": 1, "users": 1, "basket_queries": 1}}
    extra = {"manifest": manifest, "protocol": protocol, "provenance": {evil: evil}}
    sweep["baselines"][evil] = {"nll": 7.5, "recall@10": 0.2}
    html = page_of(sweep, extra)
    assert "inside baskets, reported apart" in html
    assert "<script>alert" not in html
    assert html.count("<script") == 3, "the data, the library, ours"
    parsed(html)
    assert evil in data_of(html)["sweep"]["columns"][0]["text"]
    assert evil not in json.dumps(data_of(html)["sweep"]["label"])


def test_pages_of_few_and_bad_rows():
    full = planted_sweep()
    bad_values = [row | {"metrics": {"nll": math.nan, "recall@10": None}, "errors": {}} for row in full["rows"][:3]]
    bare = [{"trial": "t0", "rung": 0, "rung_flops": 1e9, "metrics": {"nll": 3.0}}]
    no_size = [row | {"params": None} for row in full["rows"][:4]]
    cases = [[], full["rows"][:1], full["rows"][:3], bad_values, bare, no_size, [diverged(full["rows"][0])]]
    same = [full["rows"][0] | {"trial": f"t{k}"} for k in range(5)]
    probes = [full["rows"][0] | {"kind": "probe"}]
    for rows in [*cases, same, probes]:
        parsed(page_of({"rows": rows, "state": SweepState(), "baselines": full["baselines"] if rows else {}}))


def test_many_rungs_one_metric_and_long_names():
    rows = [
        {"trial": "trial-with-a-long-name", "rung": rung, "rung_flops": 10.0 ** (9 + rung),
         "params": 10 ** (3 + rung / 3), "metrics": {"mrr@10": 0.1 + 0.01 * rung}}
        for rung in range(12)
    ]  # fmt: skip
    spec = {"budget": {"ladder_flops": [row["rung_flops"] for row in rows], "total_flops": 10**14}}
    parsed(page_of({"rows": rows, "state": SweepState(spec=spec), "baselines": {}}))


def test_rows_of_two_protocols_are_refused(sweep):
    sweep["rows"][0]["protocol_hash"] = "other"
    with pytest.raises(UserError, match="evaluation protocols"):
        page_of(sweep)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    view = SweepView(Store(tmp_path), planted_sweep(6)["state"])
    page, runs = tmp_path / "report" / "index.html", tmp_path / "report" / "runs.parquet"
    assert publish_report(view) == [str(page), str(runs)]
    assert pq.read_table(runs).num_rows == len(view.rows)
    before = page.read_bytes()

    def full_disk(store, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "put", full_disk)
    with pytest.raises(OSError, match="No space left"):
        publish_report(view)
    assert page.read_bytes() == before


def test_varied_fields_are_the_swept_numbers(sweep):
    assert varied_fields(sweep["rows"]) == ["embedder_share", "groups_per_step", "learning_rate"]
    for place, row in enumerate(sweep["rows"]):
        row["config"] = {
            **row["config"],
            "copy": ("pointer", "none")[place % 2],
            "tied": bool(place % 2),
            "kind": "mlp",
        }
    assert varied_choices(sweep["rows"]) == ["copy", "tied"]
    (told,) = (column for column in data_of(page_of(sweep))["sweep"]["columns"] if column["name"] == "copy")
    assert told["value"][:2] == [1.0, 0.0]
    assert told["axis"]["ticktext"] == ["\u2068none\u2069", "\u2068pointer\u2069"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9.999e11, "10\u00b9\u00b2"),
        (1e12, "10\u00b9\u00b2"),
        (4e11, "4\u00d710\u00b9\u00b9"),
        (1.6e12, "1.6\u00d710\u00b9\u00b2"),
        (0.0, "0"),
    ],
)
def test_powers_read_well(value, text):
    assert power_text(value) == text


def test_text_for_plotly_is_plain_and_short():
    assert plain("<b>&") == "&lt;b&gt;&amp;"
    assert short("t" * 300) == f"\u2068{'t' * 35}\u2026{'t' * 12}\u2069"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (8e3, 3e6, [1e4, 1e5, 1e6]),
        (20, 400, [30, 100, 300]),
        (1.1, 1.6, [1.5]),
        (1e3, 1e21, [10**k for k in range(3, 22, 3)]),
    ],
)
def test_ticks_of_log_axes_are_few_and_round(low, high, ticks):
    assert log_ticks(low, high) == ticks


def test_a_run_that_nearly_diverged_does_not_flatten_the_picture():
    window = value_window([6.0, 6.1, 6.2, 6.3, 60.0], "nll", references=[6.6, 9.0])
    assert 5.9 < window.ends[0] < 6.0
    assert 6.6 < window.edges[1] < window.ends[1] < 7.0
    assert value_window([0.2, 0.21], "recall@10", references=[0.12]).ends[0] < 0.12
