"""Hours and money of a plan: what a worker does in a second, what its hour costs, and what a full grid would have cost.

Enters: a Plan and a Price. Leaves: a Bill, and its text. A worker is one process of a tier (a GPU, or its CPUs); its
hours do not hang on how many work at a time. Evaluation is in all figures, at the same speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bfm.errors import UserError
from bfm.sweep.plan.plan import Plan
from bfm.units import aligned, format_flops, format_seconds

DENSE_BF16_FLOPS: Mapping[str, float] = {
    "t4": 65e12,
    "v100": 125e12,
    "a10g": 70e12,
    "l4": 121e12,
    "a100": 312e12,
    "l40s": 362e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
}
"""Matmul FLOP/s per card as their makers state them, dense, in bf16 (T4, V100: fp16)."""
USUAL_SHARE = 0.2
"""Of that peak a training run of wide layers reaches; the narrow ones of a small ladder reach far less."""


@dataclass(frozen=True)
class Price:
    """What one worker does and costs."""

    flops_per_s: float
    per_hour: float | None
    """In the user's currency; None: hours alone."""
    words: str
    """Where the speed is from."""


@dataclass(frozen=True)
class RungBill:
    """One rung."""

    rung: int
    worker_hours: float
    money: float | None


@dataclass(frozen=True)
class Bill:
    """A whole sweep."""

    rungs: tuple[RungBill, ...]
    worker_hours: float
    money: float | None
    most_worker_hours: float
    """Of the whole cap."""
    most_money: float | None
    grid_worker_hours: float
    """Of every configuration of the lowest rung trained to the top one, as a grid would."""
    grid_money: float | None
    hours: float
    """On the clock, with all slots at work."""
    assumed: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def price_of(gpu: str | None, throughput: float | None, per_hour: float | None) -> Price | None:
    """What a user's options say; None where they name no price and no speed. Raises UserError."""
    if gpu and throughput:
        raise UserError("two speeds: a GPU's and your own", key="--throughput", fix="leave --gpu out")
    if throughput is not None:
        return Price(throughput, per_hour, f"{format_flops(throughput)} FLOP/s of a worker, as given")
    if gpu is None:
        if per_hour is not None:
            fix = "name --gpu, or --throughput in FLOP/s of one worker"
            raise UserError("a price needs a speed", key="--price-per-hour", fix=fix)
        return None
    peak = DENSE_BF16_FLOPS.get(gpu.lower())
    if peak is None:
        raise UserError(f"there is no GPU {gpu!r}", key="--gpu", fix=f"one of {', '.join(DENSE_BF16_FLOPS)}")
    share = f"{USUAL_SHARE:.0%} of the {format_flops(peak)} FLOP/s that its maker states"
    words = f"{share}, an assumption: small models reach less; measure, and give --throughput"
    return Price(USUAL_SHARE * peak, per_hour, words)


def bill(sweep: Plan, price: Price) -> Bill:
    """Hours and money of a plan."""

    def hours(flops: float) -> float:
        return flops / price.flops_per_s / 3600

    def money(flops: float) -> float | None:
        return None if price.per_hour is None else hours(flops) * price.per_hour

    flops = [rung.training_flops + rung.evaluation_flops for rung in sweep.rungs]
    top, most = sweep.rungs[-1], sweep.total_flops + sweep.evaluation_flops
    grid_flops = max(rung.trials for rung in sweep.rungs) * (top.rung_flops + top.evaluation_flops / max(1, top.trials))
    at_a_time = [max(1, min(sweep.slots, rung.trials)) * rung.workers[0] for rung in sweep.rungs]
    return Bill(
        rungs=tuple(RungBill(place, hours(here), money(here)) for place, here in enumerate(flops)),
        worker_hours=hours(sum(flops)),
        money=money(sum(flops)),
        most_worker_hours=hours(most),
        most_money=money(most),
        grid_worker_hours=hours(grid_flops),
        grid_money=money(grid_flops),
        hours=sum(hours(here) / number for here, number in zip(flops, at_a_time, strict=True)),
        assumed=price.words,
    )


def bill_text(priced: Bill) -> str:
    """The bill for a terminal."""
    rows = [("rung", "worker hours", "price")]
    rows += [(str(rung.rung), _hours(rung.worker_hours), _money(rung.money)) for rung in priced.rungs]
    rows.append(("all", _hours(priced.worker_hours), _money(priced.money)))
    return "\n".join([*aligned(rows), *_lines(priced)])


def _lines(priced: Bill) -> Iterator[str]:
    yield f"speed: {priced.assumed}"
    yield f"about {_hours(priced.hours)} on the clock; at most {_both(priced.most_worker_hours, priced.most_money)}"
    times = priced.grid_worker_hours / priced.worker_hours
    yield (
        f"a grid, every configuration trained to the top, would take "
        f"{_both(priced.grid_worker_hours, priced.grid_money)}: {times:.2g} times this"
    )


def _both(hours: float, money: float | None) -> str:
    return f"{_hours(hours)} of workers" + ("" if money is None else f", {_money(money)}")


def _hours(hours: float) -> str:
    return format_seconds(3600 * hours) if hours < 1 else f"{hours:,.1f} h"


def _money(money: float | None) -> str:
    return "?" if money is None else f"{money:,.2f}" if money >= 0.1 else f"{money:.2g}"
