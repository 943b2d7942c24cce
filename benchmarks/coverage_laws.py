"""The laws that `coverage.py` compares, each as a function of runs: answers with 95 % intervals by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from bfm.laws.isoflop import fit_isoflop
from bfm.laws.joint import fit_joint
from bfm.laws.joint_form import LOG_E
from bfm.laws.result import Estimate
from bfm.laws.runs import Runs
from bfm.laws.surface import fit_surface

Answer = dict[str, Estimate]
Places = Mapping[int, Mapping[str, float]]
"""Times the top C -> where a run stands: params, events, share, rate, batch."""


def isoflop(runs: Runs, places: Places) -> Answer:
    """Valleys per budget and a line through them."""
    fit = fit_isoflop(runs)
    top = fit.budgets[-1]
    found = {"N exponent": fit.parameters["N_exponent"]}
    if top.optima:
        found["N* at 1 C"] = top.optima["N_opt"]
    return found


def surface(runs: Runs, places: Places) -> Answer:
    """L(N, D), the other axes ignored."""
    fitted = fit_surface(runs)
    found = {"N exponent": fitted.fit.parameters["a"], "E": fitted.fit.parameters["E"]}
    for times in (1, 10):
        flops = 6 * places[times]["params"] * places[times]["events"]
        found[f"N* at {times} C"] = fitted.optimum(flops).optima["N_opt"]
    for times in (4, 10):
        found[f"a run at {times} C"] = fitted.predict(places[times]["params"], places[times]["events"])
    return found


def joint(runs: Runs, places: Places) -> Answer:
    """All axes, all rows, noise of rows and of trials."""
    fit = fit_joint(runs)
    found = {"N exponent": fit.interval(fit.exponent)}
    log_floor = fit.interval(lambda theta_P: theta_P[LOG_E])
    found["E"] = Estimate(*(math.exp(end) for end in (log_floor.estimate, log_floor.low, log_floor.high)))
    for times in (1, 10):
        flops = 6 * places[times]["params"] * places[times]["events"]
        log_n = fit.interval(lambda theta_P, c=flops, b=places[times]["batch"]: fit.log_best(theta_P, c, b))
        found[f"N* at {times} C"] = Estimate(*(math.exp(end) for end in (log_n.estimate, log_n.low, log_n.high)))
    for times in (4, 10):
        place = {**places[times], "flops": 6 * places[times]["params"] * places[times]["events"]}
        (loss,), (half,) = fit.predict({name: np.array([value]) for name, value in place.items()})
        found[f"a run at {times} C"] = Estimate(loss, loss - half, loss + half)
    return found


LAWS: Mapping[str, Callable[[Runs, Places], Answer]] = {"isoflop": isoflop, "surface": surface, "joint": joint}
