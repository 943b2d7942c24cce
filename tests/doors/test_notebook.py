"""What docs/notebook.ipynb shows is what its cells give."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from tests.doors.notebook import NOTEBOOK, executed

_NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def shown(notebook: nbformat.NotebookNode) -> list[Any]:
    """The text outputs of the cells of code, one list per cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[out.get("text") or out["data"]["text/plain"] for out in cell.outputs] for cell in cells]


def test_the_notebook_shows_what_it_gives(tmp_path):
    stored = shown(nbformat.read(NOTEBOOK, as_version=4))
    found = shown(executed(tmp_path))
    assert len(stored) > 3
    assert all(stored[1:]), "every cell but the imports shows something"
    for before, now in zip(stored, found, strict=True):
        assert [_NUMBER.sub("#", text).split() for text in now] == [_NUMBER.sub("#", text).split() for text in before]
        values = [[float(number) for text in texts for number in _NUMBER.findall(text)] for texts in (now, before)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
