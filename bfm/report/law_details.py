"""What lies in a LawFit, for those who draw it or put it in words: axes, optima, groups, correlations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bfm.laws.joint_law import SYMBOLS
from bfm.laws.joint_optimum import ASKED
from bfm.laws.result import BudgetOptimum, Estimate, LawFit
from bfm.report.digits import closed
from bfm.units import format_count


@dataclass(frozen=True)
class AxisWords:
    """How an axis of the joint law is named."""

    heading: str
    symbol: str
    exponent: str
    """Of its optimum in C, among the parameters."""
    label: str
    """Of a figure's x axis."""
    text: Callable[[float], str] = "{:.3g}".format

    @property
    def optimum(self) -> str:
        """Its name among a budget's optima."""
        return f"{self.symbol}_opt"


_AXES = {
    "params": AxisWords("Model size", SYMBOLS["params"], "N_exponent", "N, dense parameters", format_count),
    "share": AxisWords(
        "Embedder share", SYMBOLS["share"], "share_exponent", "s, embedder share of N", lambda s: f"{100 * s:.3g} %"
    ),
    "negatives": AxisWords(
        "Sampled negatives", SYMBOLS["negatives"], "negatives_exponent", "K, sampled negatives", format_count
    ),
    "rate": AxisWords("Learning rate", "rate", "rate_exponent", "learning rate"),
}


def axis_words(name: str) -> AxisWords:
    """Of any axis: what has no name of its own here goes by its setting's."""
    plain = name.replace("_", " ")
    return _AXES.get(name, AxisWords(plain.capitalize(), name, f"{name}_exponent", plain))


@dataclass(frozen=True)
class FittedAxis:
    """An axis as the joint law of a metric tells it."""

    fit: LawFit
    name: str

    @property
    def words(self) -> AxisWords:
        """How it is named."""
        return axis_words(self.name)

    @property
    def view(self) -> Mapping[str, Any]:
        """What is drawn of it: curves, adjusted, trend, ends (bfm.laws.joint_law)."""
        return self.fit.details["axes"][self.name]

    @cached_property
    def asked(self) -> dict[float, BudgetOptimum]:
        """C -> its optima, at the budgets whose runs differ in the axis."""
        name = self.words.optimum
        return {one.flops: one for one in self.fit.budgets if self.name == "params" or name in one.optima}

    @cached_property
    def optima(self) -> dict[float, Estimate]:
        """C -> its optimum, at the budgets whose runs tell it."""
        name = self.words.optimum
        sure = {flops: one for flops, one in self.asked.items() if one.bracketed or self.name != "params"}
        values = {flops: closed(one.optima[name]) for flops, one in sure.items() if name in one.optima}
        return {flops: value for flops, value in values.items() if value.is_known}

    @property
    def exponent(self) -> Estimate | None:
        """How its optimum moves with C; None where fewer than two budgets tell it, or its interval is open."""
        value = closed(self.fit.parameters.get(self.words.exponent, Estimate(math.nan)))
        return value if value.is_known and len(self.optima) > 1 else None


def asked_axes(fit: LawFit) -> list[FittedAxis]:
    """The axes in which runs of one C differ."""
    axes = [FittedAxis(fit, name) for name in fit.details.get("axes", ())]
    return [axis for axis in axes if any(one["x"][-1] > ASKED * one["x"][0] for one in axis.view["curves"])]


def choices_of(fit: LawFit) -> list[str]:
    """Settings whose values are steps of the loss and no axis."""
    return list(dict.fromkeys(name.partition("=")[0] for name in fit.parameters if "=" in name))


def outlook(fit: LawFit) -> list[tuple[float, Estimate]]:
    """C, ascending to beyond the runs, and the metric of one run at the optimum there."""
    return estimates(fit.details.get("outlook", ()))


def estimates(points: Sequence[Mapping[str, Any]]) -> list[tuple[float, Estimate]]:
    """(C, estimate) of entries as `Estimate.as_dict` wrote them; those without an estimate are left out."""
    return [(point["flops"], estimate_of(point)) for point in points if point["estimate"] is not None]


def estimate_of(point: Mapping[str, Any]) -> Estimate:
    """An end that is null is open (what is drawn with open ends is above 0)."""
    low, high = point["low"], point["high"]
    return Estimate(point["estimate"], 0.0 if low is None else low, math.inf if high is None else high)


@dataclass(frozen=True)
class CriticalBatch:
    """A definition of the critical batch."""

    name: str
    words: str
    """What such a batch costs."""
    symbol: str
    """Its mark in a figure."""
    power_law: str
    """In N, among the parameters: <power_law>_exponent, <power_law>_coefficient."""

    @property
    def exponent(self) -> str:
        """Of its power law, among the parameters."""
        return f"{self.power_law}_exponent"

    def of(self, fit: LawFit, group: Mapping[str, Any]) -> Estimate:
        """B of a group of a batch law."""
        return fit.parameters[f"{self.name}[{group['group']}]"]


CRITICAL = (
    CriticalBatch("overhead20", "20 % more events", "diamond", "cbs"),
    CriticalBatch("gain_halving", "twice the least events", "circle", "gain_halving"),
)


def hardest_groups(fit: LawFit) -> list[Mapping[str, Any]]:
    """Per size, ascending, the group of a batch law whose target took the most events: a, b, group and its key."""
    by_size: dict[float, list[Mapping[str, Any]]] = {}
    for group in fit.details["groups"]:
        by_size.setdefault(float(group.get("params", math.nan)), []).append(group)
    return [max(by_size[size], key=lambda group: group["b"]) for size in sorted(by_size)]


def ranked_metrics(fit: LawFit) -> list[str]:
    """The headline metrics that an agreement law holds against the loss."""
    known = [name for name in fit.details["agreement"] if "." not in name and not name.startswith("loss")]
    stems = ("recall", "ndcg", "mrr", "coverage")
    return sorted(
        known, key=lambda name: next((i for i, stem in enumerate(stems) if name.startswith(stem)), len(stems))
    )


def agreements(fit: LawFit, metric: str) -> list[tuple[float, Estimate]]:
    """(C, Spearman with its interval) of the loss and one metric."""
    return [(found["flops"], estimate_of(found["spearman"])) for found in fit.details["agreement"][metric]]
