"""`bfm init`: a first schema for a log's files, a first search space for its shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bfm.cli.common import number
from bfm.errors import UserError
from bfm.files import write_atomic

if TYPE_CHECKING:
    from bfm.events.shards import Shards

app = typer.Typer()


@app.command()
def init(
    logs: Annotated[list[str] | None, typer.Argument(metavar="LOG...", help="Files, folders, globs or URIs.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text files that are not UTF-8, such as latin-1.")] = None,
    shards: Annotated[
        str | None, typer.Option("--space", metavar="SHARDS", help="Propose a space for this shard set.")
    ] = None,
    flops: Annotated[float | None, number("What the sweep may spend, such as 1e13.", above=True)] = None,
    hours: Annotated[float | None, number("The same as hours of this machine, which is measured.", above=True)] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; stdout without it.")] = None,
) -> None:
    """Propose a schema for a log, or a search space for its shards and a budget; each choice with its reason.

    bfm init 'logs/*.csv' --out shop.yaml

    bfm init --space shards --hours 2 --out space.yaml
    """
    if bool(logs) == (shards is not None):
        raise UserError("nothing to look at", key="LOG", fix="give the files of a log, or --space SHARDS and a budget")
    if shards is not None and (flops is None) == (hours is None):
        raise UserError("a budget is needed", key="--flops", fix="give --flops 1e13 or --hours 2, one of them")
    if out is not None and out.exists():
        raise UserError("exists already", file=str(out), fix="choose another file, or remove it")
    if shards is None:
        from bfm.events.guess import guess_schema

        text, then = guess_schema(logs or [], encoding), f"bfm data prepare {out} {' '.join(logs or [])} --out shards"
    else:
        text, then = _space(shards, flops, hours or 0.0), f"bfm plan {out}"
    if out is None:
        print(text, end="")
    else:
        write_atomic(out, text.encode())
        print(f"{out}; next: {then}")


def _space(location: str, flops: float | None, hours: float) -> str:
    from bfm.events.protocol import Protocol
    from bfm.events.shards import Shards
    from bfm.sweep.plan.machine import Machine
    from bfm.sweep.space.propose import propose

    shards, machine = Shards.open(location), Machine.here()
    slots = machine.gpus or max(1, int(machine.cores))
    if flops is None:
        flops = hours * 3600 * slots * _speed(shards)
    return propose(shards, Protocol.load(shards), location, flops, slots, machine.gpus).text()


def _speed(shards: Shards) -> float:
    """FLOP/s of one task on this machine, of a small model."""
    import torch

    from bfm.training.config import TrainConfig, log_defaults
    from bfm.training.single import MEASURE_S, measure_speed

    torch.set_num_threads(1)
    decided = log_defaults((), False, shards.history_length)
    return measure_speed(TrainConfig(params=5e3, embedder_share=0.15, d_item=16, **decided), shards, MEASURE_S)
