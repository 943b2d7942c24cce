"""`bfm`: thin verbs over the rooms. stdout is data, stderr is talk; exit 0 done, 1 failed, 2 the input is wrong."""

from __future__ import annotations

import sys

import typer
from typer.exceptions import TyperException

from bfm.cli import data, laws, model, recipe, simulate, steer, sweep
from bfm.errors import UserError
from bfm.exits import exit_code

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)
app.add_typer(data.app, name="data")
for verbs in (model.app, sweep.app, steer.app, simulate.app, laws.app, recipe.app):
    app.registered_commands += verbs.registered_commands


def main() -> None:
    """Run a verb and leave with its exit code."""
    sys.exit(exit_code(_verb))


def _verb() -> int:
    """Raises UserError for words that no verb takes."""
    try:
        return app(prog_name="bfm", standalone_mode=False) or 0
    except TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return 2
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else "bfm"
        raise UserError(error.format_message().rstrip("."), fix=f"see `{verb} --help`") from error
