"""Pages from templates/: texts, tables and figures in, one file that fetches nothing out.

jinja2 escapes all text. What figures are drawn from is JSON in the page, which no browser runs; the page's policy lets
the two scripts that are ours run and no other, and nothing be fetched.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from bfm.report.plots import Figure

LIBRARY = "vendor/plotly-basic.min.js"
"""plotly.js with the traces that the page draws, as in npm's plotly.js-basic-dist-min 4.1.1, licence beside it.
PyPI's plotly has the whole library alone: four times as large, and a browser reads it in six times the time."""
_TURNS = re.compile("[\u202a-\u202e\u2066\u2067]")


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a smaller remark, a CSS class, and a share that is drawn as a bar."""

    text: str
    remark: str = ""
    kind: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Lines under heads, named by a caption. The first cell of a line names it."""

    caption: str
    heads: Sequence[str]
    lines: Sequence[Sequence[Cell | str]]
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.lines)

    @property
    def kinds(self) -> list[str]:
        """How each column is set: the first kind of its first cell."""
        return [cell.kind.split(" ")[0] for cell in next(self.cells)]

    @property
    def cells(self) -> Iterator[list[Cell]]:
        """The lines, all of cells."""
        return ([cell if isinstance(cell, Cell) else Cell(cell) for cell in line] for line in self.lines)


Facts = Sequence[tuple[str, object]]
"""What is known by name; what is None or empty is not shown."""


def render(template: str, title: str, figures: Sequence[Figure], sweep: Mapping[str, Any] | None, **parts: Any) -> str:
    """The page of a template; `sweep` is what the figures of a sweep's results are drawn from (sweep_data.py)."""
    drawn = {figure.name: figure.as_dict() for figure in figures}
    library = read_file(LIBRARY) if drawn or (sweep and sweep["metrics"]) else ""
    script, style = read_file("templates/page.js"), read_file("templates/page.css")
    data = finite({"figures": drawn, "sweep": sweep})
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (library, script) if text)
    frame = {"library": library, "script": script, "style": style, "hashes": hashes, "data": data, "sweep": sweep}
    return _environment().get_template(template).render(title=title, figures=figures, **frame, **parts)


def finite(value: Any) -> Any:
    """A value for a page: null for what JSON has no word for, and texts that keep their direction to themselves."""
    if isinstance(value, str):
        return _level(value)
    if isinstance(value, Mapping):
        return {_level(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _level(text: str) -> str:
    """The text without the marks by which a name could turn the direction of all that follows it."""
    return _TURNS.sub("", text)


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
    return _level(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def read_file(name: str) -> Markup:
    """One of this room's files, for a page as it is."""
    return Markup(files("bfm.report").joinpath(name).read_text(encoding="utf-8"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
