"""The frame of the report page: style sheet, table-sorting script and the pieces of HTML that everything is made of.

All text that comes from rows, settings or file names goes through `escape`; only SVG of our own drawing is put in raw.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --panel: #f7f8fa; --ink: #1f2430; --muted: #6b7280; --grid: #e4e6eb; --line: #dfe2e8;
  --accent: #3b4fc9; --bad: #c92a2a; --good: #2b7a4b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171c; --panel: #1b1f26; --ink: #e6e8ec; --muted: #9aa3b2; --grid: #2a2f38; --line: #2f3540;
  --accent: #8f9dff; --bad: #ff7b7b; --good: #6cc793; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 96px; }
header p.eyebrow { margin: 0; color: var(--muted); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 2px 0 10px; font-size: 32px; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { margin: 56px 0 6px; font-size: 20px; letter-spacing: -.01em; }
h3 { margin: 28px 0 6px; font-size: 15px; }
p { margin: 6px 0 12px; max-width: 76ch; }
p.lede { font-size: 17px; }
.muted, figcaption, caption { color: var(--muted); }
nav { margin: 18px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 26px 0 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 13px 15px 12px; }
.card .name { color: var(--muted); font-size: 13px; }
.card .value { font-size: 25px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.card .note { color: var(--muted); font-size: 12.5px; line-height: 1.45; }
.card .gain { color: var(--good); } .card .loss { color: var(--bad); }
.meter { height: 8px; border-radius: 4px; background: var(--grid); overflow: hidden; margin: 8px 0 6px; }
.meter span { display: block; height: 100%; background: var(--accent); }
figure { margin: 18px 0 8px; overflow-x: auto; } figure svg { display: block; height: auto; }
figcaption { font-size: 13.5px; max-width: 84ch; margin-top: 8px; }
.scroll { overflow-x: auto; margin: 12px 0; border: 1px solid var(--line); border-radius: 10px; }
.tall { max-height: 560px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--panel); color: var(--muted); font-weight: 600; position: sticky; top: 0; }
th:first-child, td:first-child, .text { text-align: left; }
td small { color: var(--muted); font-size: 12px; }
td.wrap { white-space: normal; min-width: 24ch; text-align: left; }
tbody tr:hover td { background: var(--panel); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: ' \\2191'; }
th[aria-sort=descending] button::after { content: ' \\2193'; }
.bad { color: var(--bad); }
.best { font-weight: 650; }
dl { display: grid; grid-template-columns: minmax(120px, max-content) 1fr; gap: 5px 22px; margin: 12px 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.55 ui-monospace, 'SF Mono', Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  overflow-x: auto; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 64px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13px; }
@media print { .scroll, .tall { overflow: visible; max-height: none; } nav { display: none; } }
"""

# Clicking a head sorts by the cells' data-value (numbers) or text; empty cells stay at the end.
SCRIPT = """
document.querySelectorAll('table.sortable').forEach(function (table) {
  table.querySelectorAll('th').forEach(function (head, column) {
    var button = document.createElement('button');
    button.type = 'button'; button.textContent = head.textContent;
    head.textContent = ''; head.appendChild(button);
    button.addEventListener('click', function () {
      var up = head.getAttribute('aria-sort') !== 'ascending';
      table.querySelectorAll('th').forEach(function (other) { other.removeAttribute('aria-sort'); });
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      var body = table.tBodies[0];
      var key = function (row) {
        var value = row.cells[column].dataset.value;
        if (value === '') { return null; }
        return value === undefined ? row.cells[column].textContent : Number(value);
      };
      Array.from(body.rows).map(function (row) { return [key(row), row]; }).sort(function (a, b) {
        if (a[0] === null || b[0] === null) { return (a[0] === null) - (b[0] === null); }
        var order = typeof a[0] === 'number' ? a[0] - b[0] : String(a[0]).localeCompare(String(b[0]));
        return up ? order : -order;
      }).forEach(function (pair) { body.appendChild(pair[1]); });
    });
  });
});
"""


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a smaller remark, the number to sort by and a CSS class."""

    text: str
    remark: str = ""
    value: float | None = None
    kind: str = ""

    def markup(self) -> str:
        """The <td> element."""
        value = ""
        if self.value is not None:
            value = f' data-value="{self.value!r}"' if math.isfinite(self.value) else ' data-value=""'
        kind = f' class="{self.kind}"' if self.kind else ""
        remark = f"<br><small>{escape(self.remark)}</small>" if self.remark else ""
        return f"<td{kind}{value}>{escape(self.text)}{remark}</td>"


def escape(text: object) -> str:
    """Any text, made safe for element content and double-quoted attributes."""
    return html.escape(str(text), quote=True)


def page(title: str, body: str) -> str:
    """The whole document; nothing in it is fetched from anywhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(anchor: str, heading: str, body: str) -> str:
    """A part of the page under its heading; empty where there is nothing to show."""
    return f'<section id="{escape(anchor)}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>' if body else ""


def table(heads: Sequence[str], lines: Sequence[Sequence[Cell | str]], *, sortable: bool = False) -> str:
    """A table in a frame that scrolls by itself; empty where there are no lines."""
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "\n".join(f"<tr>{''.join(_cell(cell).markup() for cell in line)}</tr>" for line in lines)
    frame = "scroll tall" if len(lines) > 16 else "scroll"
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="{frame}"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """A definition list of what is known; pairs without a value (None, empty) are left out."""
    known = [(name, value) for name, value in pairs if value is not None and value != ""]
    if not known:
        return ""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in known)}</dl>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of escaped text; empty where there is none."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>" if text else ""


def _cell(cell: Cell | str) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)
