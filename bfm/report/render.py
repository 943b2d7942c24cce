"""Pages from templates/: texts, tables and figures in, one file that fetches nothing out.

jinja2 escapes all text. What figures are drawn from is JSON in the page, which no browser runs; the page's policy lets
the two scripts that are ours run and no other, and nothing be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from bfm.report.plots import Figure, finite, level


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a smaller remark, the number to sort by (NaN: none, at the end) and a CSS class."""

    text: str
    remark: str = ""
    value: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Lines under heads, named by a caption. The first cell of a line names it."""

    caption: str
    heads: Sequence[str]
    lines: Sequence[Sequence[Cell | str]]
    note: str = ""
    sortable: bool = False

    def __bool__(self) -> bool:
        return bool(self.lines)

    @property
    def cells(self) -> Iterator[list[Cell]]:
        """The lines, all of cells."""
        return ([cell if isinstance(cell, Cell) else Cell(cell) for cell in line] for line in self.lines)


Facts = Sequence[tuple[str, object]]
"""What is known by name; what is None or empty is not shown."""


def render(template: str, title: str, figures: Sequence[Figure], sweep: Mapping[str, Any] | None, **parts: Any) -> str:
    """The page of a template; `sweep` is what the figures of a sweep's results are drawn from (sweep_data.py)."""
    drawn = {figure.name: figure.as_dict() for figure in figures}
    library, script, style = Markup(get_plotlyjs()) if drawn or sweep else "", _asset("page.js"), _asset("page.css")
    data = finite({"figures": drawn, "sweep": sweep})
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (library, script) if text)
    frame = {"library": library, "script": script, "style": style, "hashes": hashes, "data": data, "sweep": sweep}
    return _environment().get_template(template).render(title=title, figures=figures, **frame, **parts)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bfm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _shown(value: object) -> object:
    return level(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> Markup:
    return Markup(files("bfm.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
