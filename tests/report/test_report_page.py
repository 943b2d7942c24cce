"""Figures and the page: whole, self-contained, escaped, and unbroken by few or bad rows."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest

from bfm.errors import UserError
from bfm.events.fields import FittedField
from bfm.events.manifest import Manifest
from bfm.events.repeats import rule_facts
from bfm.files import Store
from bfm.laws.frontier import Results, frontier
from bfm.report import figures, style
from bfm.report.page import render_report
from bfm.report.sweep_report import publish_report
from bfm.report.sweep_view import SweepView
from bfm.report.tables import behind_text, trials_in_order
from bfm.sweep.state import SweepState
from bfm.units import format_count
from tests.report.planted import compare, diverged, planted_sweep

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
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:image/png")):
                self.fetched.append(value)


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    return parser


def rendered(sweep, extra=None) -> str:
    return render_report(sweep["rows"], sweep["state"], sweep["baselines"], extra or {})["index.html"].decode()


def test_report_of_a_sweep_is_whole_and_self_contained(sweep):
    files = render_report(sweep["rows"], sweep["state"], sweep["baselines"], {})
    assert list(files)[-1] == "index.html"
    html = files["index.html"].decode()
    page = parsed(html)
    assert page.fetched == []
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    for reference in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html):
        assert (reference[0] or reference[1]) in page.ids
    for anchor in ("best", "frontier", "curves", "isoflop", "settings", "agreement", "spend", "trials", "failures"):
        assert anchor in page.ids
    assert pq.read_table(io.BytesIO(files["runs.parquet"])).num_rows == len(sweep["rows"])
    for figure in ("frontier", "curves", "isoflop", "settings", "agreement", "spend"):
        ElementTree.fromstring(files[f"figures/{figure}.svg"])
    # Every trial has its line.
    assert all(f"<td>t{trial:03d}</td>" in html for trial in range(24))


def test_a_sweep_below_a_floor_is_called_so_in_the_first_lines(sweep):
    sweep["baselines"]["co_occurrence"]["coverage@10"] = 0.01
    assert "The best of the sweep is above every floor in nll" in rendered(sweep)
    sweep["baselines"]["personal"] = {"nll": 1.0, "recall@10": 0.9}
    html = rendered(sweep)
    lede = html[html.index('class="lede"') :][:900]
    assert "The best of the sweep is BELOW the strongest floor in nll (" in lede
    assert "personal 0.9) and above it in ndcg@10 (" in lede
    assert "below the strongest floor, personal: " in html
    assert "above the strongest floor, co-occurrence: " in html


def test_the_page_tells_differences_on_the_same_queries(sweep):
    html = render_report(sweep["rows"], sweep["state"], sweep["baselines"], {}, compare=compare)["index.html"].decode()
    point = frontier(sweep["rows"], "nll", compare)[2]
    change, error = point.change.value, point.change.error
    remark = (
        f"{point.row['trial']}; N {format_count(point.row['params'])}; {change:+.4f} \u00b1 {error:.4f} against the"
    )
    assert f"<small>{remark} rung below; within error: {point.rivals[0][0]['trial']}" in html
    second = trials_in_order(Results(sweep["rows"]))[1]
    assert f"<small>{behind_text(second, point.row, 'nll', compare)}</small>" in html
    assert "~</small>" not in html
    assert "~</small>" in rendered(sweep)


def test_the_page_is_a_function_of_its_input():
    assert rendered(planted_sweep(6)) == rendered(planted_sweep(6))


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
    html = rendered(sweep, extra)
    assert "inside baskets, reported apart" in html
    assert "<script>alert" not in html
    assert html.count("<script>") == 1
    parsed(html)


def test_pages_of_few_and_bad_rows():
    full = planted_sweep()
    bad_values = [row | {"metrics": {"nll": math.nan, "recall@10": None}, "errors": {}} for row in full["rows"][:3]]
    bare = [{"trial": "t0", "rung": 0, "rung_flops": 1e9, "metrics": {"nll": 3.0}}]
    no_size = [row | {"params": None} for row in full["rows"][:4]]
    cases = [[], full["rows"][:1], full["rows"][:3], bad_values, bare, no_size, [diverged(full["rows"][0])]]
    same = [full["rows"][0] | {"trial": f"t{k}"} for k in range(5)]
    probes = [full["rows"][0] | {"kind": "probe"}]
    for rows in [*cases, same, probes]:
        parsed(rendered({"rows": rows, "state": SweepState(), "baselines": full["baselines"] if rows else {}}))


def test_many_rungs_one_metric_and_long_names():
    rows = [
        {"trial": "trial-with-a-long-name", "rung": rung, "rung_flops": 10.0 ** (9 + rung),
         "params": 10 ** (3 + rung / 3), "metrics": {"mrr@10": 0.1 + 0.01 * rung}}
        for rung in range(12)
    ]  # fmt: skip
    spec = {"budget": {"ladder_flops": [row["rung_flops"] for row in rows], "total_flops": 10**14}}
    parsed(rendered({"rows": rows, "state": SweepState(spec=spec), "baselines": {}}))


def test_rows_of_two_protocols_are_refused(sweep):
    sweep["rows"][0]["protocol_hash"] = "other"
    with pytest.raises(UserError, match="evaluation protocols"):
        rendered(sweep)


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    view = SweepView(Store(tmp_path), planted_sweep(6)["state"])
    page = tmp_path / "report" / "index.html"
    assert publish_report(view)[0] == str(page)
    before = page.read_bytes()

    def full_disk(store, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "put", full_disk)
    with pytest.raises(OSError, match="No space left"):
        publish_report(view)
    assert page.read_bytes() == before


def test_overview_is_a_picture(sweep):
    data = figures.overview_png(sweep["rows"], sweep["baselines"])
    assert data.startswith(b"\x89PNG")


def test_figure_colours_follow_the_page_theme_but_not_in_files(sweep):
    figure = figures.isoflop_figure(sweep["rows"], ["nll"])
    text = style.svg_text(figure)
    inline = style.inline_svg(text, "isoflop", 'a "quoted" <caption>')
    assert style.INK not in inline
    assert "var(--ink)" in inline
    assert "&quot;quoted&quot; &lt;caption>" in inline
    assert "var(" not in text
    ElementTree.parse(io.BytesIO(inline.encode()))


def test_varied_fields_are_the_swept_numbers(sweep):
    assert figures.varied_fields(sweep["rows"]) == ["embedder_share", "groups_per_step", "learning_rate"]


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
    assert style.power_text(value) == text
