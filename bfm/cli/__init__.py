"""`bfm`: thin verbs over the rooms. stdout is data, stderr is talk; exit 0 done, 1 failed, 2 the input is wrong."""

from __future__ import annotations

import sys

import typer

from bfm.cli import data, init, laws, model, recipe, simulate, sweep
from bfm.exits import exit_code

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)
app.add_typer(data.app, name="data")
for verbs in (init.app, model.app, sweep.app, simulate.app, laws.app, recipe.app):
    app.registered_commands += verbs.registered_commands


def main() -> None:
    """Run a verb and leave with its exit code."""
    sys.exit(exit_code(app))
