"""Several spaces, one sweep after the other: `python -m ray_jobs.study SPACE... --storage URI --name NAME`.

Enters: search-space files, a storage prefix, a name. Leaves: <storage>/<name>/<space>/ for each, as `bfm sweep` leaves
it, and study.yaml, which lists those folders for what reports on all of them. The same command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bfm.errors import UserError
from bfm.exits import exit_code
from bfm.files import Store
from bfm.sweep.ledger.study import list_sweeps
from bfm.sweep.space.on_log import open_space
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.spec import check_name, resolve
from ray_jobs.sweep import sweep_verb

SIGNALLED = 128
"""Exit codes from here up are signals."""


def study_verb(spaces: Sequence[str | Path], storage: str, name: str, overrides: Sequence[str] = ()) -> int:
    """`bfm study`: the exit code, that of the worst sweep; a signal ends the study.

    Raises UserError before anything is trained where a space is wrong or infeasible, and what a sweep raises: a fault
    of one (damage, a pause, storage that is gone) is likely to be the next one's, too.
    """
    check_name(name, "--name")
    specs = [resolve(space, overrides) for space in spaces]
    names = [spec.name for spec in specs]
    for place, spec in enumerate(specs):
        if spec.name in names[:place]:
            raise UserError(f"{spec.name!r} is there twice", file=str(spaces[place]), key="name", fix="name it anew")
        _check_feasible(spec, str(spaces[place]))
    store = Store(storage).child(name)
    list_sweeps(store, names)
    worst = 0
    for space in spaces:
        code = sweep_verb(space, store.uri, overrides=overrides)
        if code >= SIGNALLED:
            return code
        worst = max(worst, code)
    return worst


def _check_feasible(spec: SweepSpec, file: str) -> None:
    try:
        _ = open_space(spec).feasible.sample
    except UserError as error:
        raise type(error)(error.what, file=error.file or file, key=error.key, fix=error.fix) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The job's entry point."""
    parser = argparse.ArgumentParser(prog="python -m ray_jobs.study", description=__doc__)
    parser.add_argument("spaces", nargs="+", metavar="SPACE", help="search-space YAMLs, run in this order")
    parser.add_argument("--storage", required=True, help="path or URI that every node reaches")
    parser.add_argument("--name", required=True, help="folder of the study under the storage")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    return exit_code(lambda: study_verb(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
