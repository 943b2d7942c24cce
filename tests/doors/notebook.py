"""docs/notebook.ipynb beside a planted study: `python -m tests.doors.notebook` runs it and stores what it shows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.doors.planted import write_study

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run in a folder, in which `runs/study` is planted; raises where a cell does."""
    write_study(str(folder / "runs" / "study"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        # When a cell ran is nobody's matter, and would be another change at every run.
        cell.metadata.pop("execution", None)
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        nbformat.write(executed(Path(place)), NOTEBOOK)
