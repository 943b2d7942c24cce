"""What the verbs share: options, the bounds of numbers among them, and printing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bfm.errors import UserError
from bfm.units import parse_count, parse_number

_SEEDS = 1 << 63


def number(help: str, low: float = 0, high: float = math.inf, *, above: bool = False, below: bool = False) -> Any:
    """An option that is a number such as 1e12 or 64k, from `low` (`above` it) to `high` (`below` it)."""
    floor = f"above {low:g}" if above else f"{low:g} or more"
    ceiling = "" if high == math.inf else f", {'below' if below else 'at most'} {high:g}"

    def take(param: typer.CallbackParam, value: str | None) -> float | None:
        if value is None:
            return None
        found = parse_number(value, key=param.opts[0])
        if found < low or found > high or (above and found == low) or (below and found == high):
            raise UserError(f"{value} is out of range", key=param.opts[0], fix=f"write {floor}{ceiling}")
        return found

    return typer.Option(help=help, parser=str, callback=take, metavar="NUMBER")


def whole(help: str, low: int = 0, high: int | None = None) -> Any:
    """An option that is a whole number, from `low` to `high`."""
    fix = f"write a whole number, {low} or more" if high is None else f"write a whole number from {low} to {high}"

    def take(param: typer.CallbackParam, value: str | None) -> int | None:
        if value is None:
            return None
        found = parse_count(value, key=param.opts[0])
        if found < low or (high is not None and found > high):
            raise UserError(f"{value} is out of range", key=param.opts[0], fix=fix)
        return found

    return typer.Option(help=help, parser=str, callback=take, metavar="N")


def seed(help: str = "Seed.") -> Any:
    """An option that is one."""
    return whole(help, 0, _SEEDS - 1)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the file: budget.total_flops=1e13")
]
ShardsOption = Annotated[str, typer.Option("--shards", help="Prepared shard set (a folder or URI).")]


def parse_ks(text: str) -> tuple[int, ...]:
    """List lengths from text such as 5,10,50, rising. Raises UserError for anything but whole numbers from 1 on."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{text!r} is no list of lengths", key="--k", fix="write whole numbers from 1 on: 5,10,50")
    return tuple(sorted({int(part) for part in parts}))


def show(value: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """A result on stdout."""
    show_either(as_json, lambda: value, lambda: text(value))


def show_either(as_json: bool, value: Callable[[], Any], text: Callable[[], str]) -> None:
    """A result on stdout, where JSON and text take work of their own."""
    print(json.dumps(value(), indent=1) if as_json else text())


def with_shards(overrides: list[str] | None, shards: str | None) -> list[str]:
    """The overrides of a space, --shards among them."""
    return [*(overrides or []), *([f"data.shards={shards}"] if shards else [])]


def chosen_metrics(asked: str | None, known: list[str], default: list[str]) -> list[str]:
    """Metrics from text such as nll,ndcg@10 or all. Raises UserError for one that is not known."""
    if asked is None:
        return default
    names = known if asked == "all" else [name.strip() for name in asked.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"there is no metric {name!r}", key="--metric", fix=f"one of {', '.join(known)}, or all")
    return names
