"""Steering a sweep from anywhere that sees its storage: stop, cancel, enqueue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bfm.cli.common import Json, seed, show
from bfm.errors import UserError

if TYPE_CHECKING:
    from bfm.sweep.ledger.study import StoredSweep

app = typer.Typer()
SweepDir = Annotated[str, typer.Argument(metavar="DIR", help="Folder or URI of a sweep.")]


@app.command()
def stop(sweep_dir: SweepDir, as_json: Json = False) -> None:
    """End a running sweep gracefully: its tasks leave their checkpoints, and the same `bfm sweep` goes on from them."""
    from bfm.sweep.ledger.lease import driver_of
    from bfm.sweep.ledger.state import STOP
    from bfm.sweep.ledger.study import read_alone

    sweep = read_alone(sweep_dir)
    driver = driver_of(sweep.store)
    if driver is None:
        raise UserError("nobody runs this sweep", file=sweep_dir, fix="there is nothing to stop")
    _ask(sweep, STOP, {"epoch": driver["epoch"]}, as_json)


@app.command()
def cancel(
    sweep_dir: SweepDir,
    trial: Annotated[str, typer.Argument(help="Trial, e.g. t00012, or the request of one that has not begun.")],
    as_json: Json = False,
) -> None:
    """Train a trial no further: what runs of it ends, its rows stay, and it is never promoted."""
    from bfm.sweep.driver.requests import check_cancel
    from bfm.sweep.ledger.state import CANCEL
    from bfm.sweep.ledger.study import read_alone

    sweep = read_alone(sweep_dir)
    check_cancel(sweep.state, trial)
    _ask(sweep, CANCEL, {"trial": trial}, as_json)


@app.command()
def enqueue(
    sweep_dir: SweepDir,
    config: Annotated[Path, typer.Argument(help="YAML of one configuration (params, learning_rate, ...).")],
    seed: Annotated[int | None, seed("Seed of the trial (default: the sweep's first).")] = None,
    shards: Annotated[str | None, typer.Option(help="The sweep's shard set, where it has moved.")] = None,
    as_json: Json = False,
) -> None:
    """Have a sweep try a configuration of your own next, under its cap; from then on it is a trial like the others.

    Settings that the file leaves out are the space's constants, else those of `bfm train`.
    """
    from bfm.sweep.driver.requests import own_request
    from bfm.sweep.ledger.state import ENQUEUE
    from bfm.sweep.ledger.study import read_alone
    from bfm.yaml import load_yaml

    sweep = read_alone(sweep_dir)
    try:
        asked = own_request(sweep.state, load_yaml(config), seed, shards)
    except UserError as error:
        raise type(error)(error.what, file=error.file or str(config), key=error.key, fix=error.fix) from None
    _ask(sweep, ENQUEUE, asked, as_json)


def _ask(sweep: StoredSweep, verb: str, asked: dict[str, Any], as_json: bool) -> None:
    """Put the request and say what came of it, as far as that is seen in time. Raises UserError for a refusal."""
    from bfm.sweep.driver.requests import put_request, request_words, wait_for_answer
    from bfm.sweep.ledger.lease import driver_of
    from bfm.sweep.ledger.ledger import read_state

    request = put_request(sweep.store, verb, asked)
    running = driver_of(sweep.store) is not None
    answer = wait_for_answer(request, lambda: read_state(sweep.store)) if running else None
    if answer is not None and answer["refused"] is not None:
        raise UserError(f"the sweep refused it: {answer['refused']}", file=sweep.store.uri)
    later = "not answered yet; `bfm status` will tell" if running else "the next `bfm sweep` there takes it up"
    words = f"{request.id}: {later}" if answer is None else f"{request.id}: {request_words(answer)}"
    show({"id": request.id, "verb": verb, "answer": answer}, as_json, lambda _: words)
