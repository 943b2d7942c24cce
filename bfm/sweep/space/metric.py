"""What a sweep selects by: a metric, others with a frontier of their own, bounds that a useful model keeps.

Enters: names and bounds as YAML has them (coverage@10 >= 0.05). Leaves: metrics that know which way is better.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic.dataclasses import dataclass

from bfm.errors import UserError
from bfm.laws.frontier import Goal, goal_of
from bfm.sweep.space.keys import SECTION
from bfm.sweep.space.words import CHOICES
from bfm.units import parse_number
from bfm.yaml import did_you_mean

_TARGET_METRICS = ("recall@10", "ndcg@10", "mrr@10")
METRICS = (
    "nll",
    *_TARGET_METRICS,
    "coverage@10",
    *(f"warm.{name}" for name in _TARGET_METRICS),
    "basket.nll",
    *(f"basket.{name}" for name in _TARGET_METRICS),
)
_LOGIT_EDGE = 1e-5
_TEXT = WithJsonSchema({"type": "string"})


@dataclass(frozen=True, config=SECTION)
class Metric:
    """A figure of rows, compared at equal C."""

    name: str
    goal: Goal | None = None
    """May be written out; it follows from the name."""

    def __post_init__(self) -> None:
        only = goal_of(self.name)
        if self.goal not in (None, only):
            raise UserError(f"{self.name} is to be {only}d, not {self.goal}d", key="goal", fix=f"write {only}")
        object.__setattr__(self, "goal", only)

    def loss(self, value: float) -> float:
        """The value, signed so that smaller is better; of a loss, the value again."""
        return value if self.goal == "minimize" else -value

    @property
    def is_bounded(self) -> bool:
        """Whether values lie in [0, 1]: all but losses."""
        return self.goal == "maximize"

    def to_model(self, loss: float) -> float:
        """A loss as surrogates see it: of bounded metrics minus the logit of the value (kept off 0 and 1)."""
        if not self.is_bounded:
            return loss
        value = min(max(-loss, _LOGIT_EDGE), 1 - _LOGIT_EDGE)
        return -math.log(value / (1 - value))

    def from_model(self, modelled: float) -> float:
        """The metric's own value of what a surrogate sees."""
        return 1 / (1 + math.exp(modelled)) if self.is_bounded else modelled


@dataclass(frozen=True, config=SECTION)
class Constraint:
    """A bound that a useful model keeps."""

    metric: Metric
    bound: float
    """Smallest value of a maximised metric, largest of a minimised one."""

    def holds(self, value: float) -> bool:
        """Whether a row's value keeps it."""
        return value >= self.bound if self.metric.goal == "maximize" else value <= self.bound

    @property
    def loss_bound(self) -> float:
        """As surrogates see it."""
        return self.metric.to_model(self.metric.loss(self.bound))

    @property
    def text(self) -> str:
        """As YAML has it: coverage@10 >= 0.05."""
        short = f"{self.bound:g}"
        bound = short if float(short) == self.bound else repr(self.bound)
        return f"{self.metric.name} {'>=' if self.metric.goal == 'maximize' else '<='} {bound}"


def known(name: Any) -> Metric:
    """The metric of a name. Raises UserError where rows have no such figure."""
    if name not in METRICS:
        raise UserError(f"unknown metric {name!r}", fix=did_you_mean(str(name), METRICS, CHOICES))
    return Metric(name)


def _read_other(value: Any) -> Metric:
    return value if isinstance(value, Metric) else known(value)


def _read_constraint(value: Any) -> Constraint:
    if isinstance(value, Constraint):
        return value
    parts = re.fullmatch(r"\s*(\S+?)\s*(>=|<=)\s*(\S+)\s*", str(value))
    if parts is None:
        raise UserError(f"{value!r} is no bound", fix="write e.g. coverage@10 >= 0.05")
    metric = known(parts[1])
    if parts[2] != (">=" if metric.goal == "maximize" else "<="):
        raise UserError(f"{metric.name} is to be {metric.goal}d", fix="turn the bound round")
    return Constraint(metric, parse_number(parts[3]))


Other = Annotated[Metric, BeforeValidator(_read_other), PlainSerializer(lambda metric: metric.name), _TEXT]
Bound = Annotated[Constraint, BeforeValidator(_read_constraint), PlainSerializer(lambda bound: bound.text), _TEXT]


@dataclass(frozen=True, config=SECTION)
class Selection(Metric):
    """The metric that a sweep selects by, at equal C."""

    others: tuple[Other, ...] = ()
    """Further metrics with a frontier of their own; the spend is shared."""
    constraints: tuple[Bound, ...] = ()
    """What a useful model keeps to, such as coverage@10 >= 0.05."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [self.name, *(metric.name for metric in self.others)]
        for place, metric in enumerate(self.others):
            if metric.name in names[: place + 1]:
                raise UserError(f"{metric.name!r} is named twice", key=f"others.{place}", fix="name every metric once")
