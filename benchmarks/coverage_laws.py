"""The laws that `coverage.py` compares, each as a function of runs: answers with 95 % intervals by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from bfm.laws.isoflop import fit_isoflop
from bfm.laws.joint import fit_joint
from bfm.laws.joint_form import LOG_E
from bfm.laws.joint_optimum import optima_of
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
    fit = fit_surface(runs)
    return {"N exponent": fit.parameters["a"], "E": fit.parameters["E"], "N* at 1 C": fit.budgets[-1].optima["N_opt"]}


def joint(runs: Runs, places: Places) -> Answer:
    """All axes, all rows, noise of rows and of trials, and what the form misses."""
    fit = fit_joint(runs)
    best = optima_of(fit, runs)
    flops = {times: 6 * place["params"] * place["events"] for times, place in places.items()}
    found = {"N exponent": best.size.exponent(), "E": fit.parameter(LOG_E)}
    found |= {"N* at 1 C": best.size.own(flops[1]) or best.size.at(flops[1]), "N* at 10 C": best.size.at(flops[10])}
    for times in (4, 10):
        columns = {name: np.array([value]) for name, value in {**places[times], "flops": flops[times]}.items()}
        (loss,), (half,) = fit.predict(columns)
        found[f"a run at {times} C"] = Estimate.around(loss, half)
    return found


LAWS: Mapping[str, Callable[[Runs, Places], Answer]] = {"isoflop": isoflop, "surface": surface, "joint": joint}
