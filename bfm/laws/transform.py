"""Metrics as losses: laws fall with N and D towards a floor above 0, so what is maximised in (0, 1) is turned round."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from bfm.errors import UserError
from bfm.laws.frontier import goal_of
from bfm.laws.result import Estimate

Value = TypeVar("Value", float, np.ndarray)


def to_loss(metric: str, values: np.ndarray) -> np.ndarray:
    """A loss as it is; a metric to maximise, in (0, 1), as minus its natural log.

    The log keeps predictions inside (0, 1) and fits both ends of a metric's growth: a power of C while it is small,
    saturation at exp(-E). Raises UserError for values that a law in this form cannot meet.
    """
    bad = ~has_loss(metric, values)
    if bad.any():
        fix = "keep losses above 0, and ranking metrics (recall, ndcg, mrr, coverage) between 0 and 1"
        raise UserError(f"{int(bad.sum())} of {len(values)} values of {metric} have no loss", key="--metric", fix=fix)
    return values if goal_of(metric) == "minimize" else -np.log(values)


def has_loss(metric: str, values: np.ndarray) -> np.ndarray:
    """Which values `to_loss` can take."""
    return (values > 0) & ((values < 1) | (goal_of(metric) == "minimize"))


def from_loss(metric: str, loss: Value) -> Value:
    """The metric's own units; falling in `loss` where the metric is maximised."""
    return loss if goal_of(metric) == "minimize" else np.exp(-loss)


def in_units(metric: str, loss: Estimate) -> Estimate:
    """An estimate of the loss as one of the metric."""
    if goal_of(metric) == "minimize":
        return loss
    return loss.through_falling(lambda end: float(from_loss(metric, end)))


def transform_name(metric: str) -> str:
    """For a result's definitions."""
    return metric if goal_of(metric) == "minimize" else f"-ln({metric})"
