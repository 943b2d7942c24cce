"""`bfm`: thin verbs over the rooms. stdout is data, stderr is talk; exit 0 done, 1 failed, 2 the input is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from bfm.cli import data, init, laws, model, recipe, simulate, steer, sweep
from bfm.errors import UserError
from bfm.exits import exit_code

GROUPS: Mapping[str, tuple[str, ...]] = {
    "From a log to shards": ("data", "init"),
    "Before a sweep": ("doctor", "plan", "simulate"),
    "A sweep": ("sweep", "study", "status", "stop", "cancel", "enqueue"),
    "What it tells": ("report", "fit", "recipe", "export-optuna"),
    "One model": ("train", "eval", "export", "predict"),
    "For editors": ("schema",),
}
"""The verbs in the order in which a user needs them."""


class Verbs(TyperGroup):
    """Help lists the verbs by group."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of `GROUPS`; a verb that is in none comes last."""
        known = [name for names in GROUPS.values() for name in names if name in self.commands]
        return [*known, *sorted(set(self.commands) - set(known))]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """A section a group."""
        width = formatter.width - 6 - max(map(len, self.commands))
        for title, rows in self._sections(ctx, width):
            with formatter.section(title):
                formatter.write_dl(rows)

    def _sections(self, ctx: Any, width: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        left = self.list_commands(ctx)
        for title, names in {**GROUPS, "More": tuple(left)}.items():
            here = [name for name in names if name in left]
            left = [name for name in left if name not in here]
            if here:
                yield title, [(name, self.commands[name].get_short_help_str(width)) for name in here]


app = typer.Typer(
    cls=Verbs,
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(data.app, name="data")
for verbs in (init.app, model.app, sweep.app, steer.app, simulate.app, laws.app, recipe.app):
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
