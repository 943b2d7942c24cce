"""`bfm`: thin verbs over the rooms. stdout is data, stderr is talk; exit 0 done, 1 failed, 2 the input is wrong."""

from __future__ import annotations

import sys

import typer

from bfm.cli import data, laws, model, recipe, simulate, sweep
from bfm.cli.common import fail
from bfm.errors import CorruptError, DivergedError, PausedError, UserError
from bfm.files import check_encoding

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)
app.add_typer(data.app, name="data")
for verbs in (model.app, sweep.app, simulate.app, laws.app, recipe.app):
    app.registered_commands += verbs.registered_commands


def main() -> None:
    """Run a verb; a user's mistake is one line and exit 2, a fault one line and exit 1. BFM_DEBUG=1 shows the trace."""
    try:
        check_encoding()
        app(standalone_mode=True)
    except UserError as error:
        fail(error, 2)
    except (CorruptError, DivergedError, PausedError, OSError) as error:
        fail(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
