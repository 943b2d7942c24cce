"""Where the frontier policy's candidates come from: random draws, Optuna's samplers, or both.

Whole sweeps under two planted laws in a space of 4 axes, one worker and 16; regrets at equal FLOPs, every source with
the same seeds. Run with `python benchmarks/candidates.py`; writes benchmarks/results/frontier_candidates.md.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from common import machine, publish
from frontier import PLANTED_LAWS

from bfm.sweep.policies.proposer import Proposer
from bfm.sweep.policies.space_arena import SpaceArena
from bfm.sweep.simulator.fleet import Fleet
from bfm.sweep.simulator.forecast import best_losses
from bfm.sweep.simulator.law import Law, LawCosts, law_row
from bfm.sweep.simulator.run import simulate
from bfm.sweep.space.space import FeasibleSet
from bfm.sweep.space.spec import from_dict

LOG = {"distribution": "log_uniform_values"}
SPACE = {
    "name": "joint",
    "metric": {"name": "nll"},
    "parameters": {
        "params": {**LOG, "min": 3e4, "max": 3e7},
        "embedder_share": {**LOG, "min": 0.005, "max": 0.2},
        "learning_rate": {**LOG, "min": 1e-4, "max": 3e-2},
        "aspect": {**LOG, "min": 8, "max": 128},
        "groups_per_step": {"value": 4},
        "window": {"value": 64},
        "group_windows": {"value": 4},
    },
    "budget": {"ladder_flops": ["1e15", "4e15", "1.6e16"], "total_flops": "3.2e17", "max_trials": 200},
    "data": {"shards": "nowhere"},
}


class Quasi(Proposer):
    """A pool of Optuna's QMCSampler: a scrambled Sobol sequence per era."""

    def _era_draws(self, era: int) -> Iterator[dict[str, Any]]:
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        seed = int(np.random.default_rng((self.spec.seeds[0], era)).integers(1 << 31))
        study = optuna.create_study(sampler=optuna.samplers.QMCSampler(scramble=True, seed=seed))
        first = self.feasible.sample[0][0].config.as_dict()
        # The sampler draws its first trial at random.
        study.add_trial(optuna.trial.create_trial(value=0.0, params=self.to_optuna(first), distributions=self.axes))
        while True:
            yield self.from_optuna(study.ask(self.axes).params)


class Alone(Proposer):
    """TPE's points only, once it has rows to learn from."""

    def pool(self, state, number):
        both = super().pool(state, number)
        return tuple(proposal for proposal in both if proposal.source == "optuna") or both


@dataclass(frozen=True)
class Source:
    """Of candidates."""

    name: str
    method: str
    proposer: type[Proposer]
    optuna_draws: int


SOURCES = (
    Source("96 random", "random", Proposer, 0),
    Source("96 random, 2 of TPE", "optuna", Proposer, 2),
    Source("96 random, 16 of TPE", "optuna", Proposer, 16),
    Source("16 of TPE alone", "optuna", Alone, 16),
    Source("96 of QMC", "random", Quasi, 0),
)


@dataclass(frozen=True)
class Result:
    """Of one sweep."""

    regret: float
    taken: float
    """Share of the trials that TPE proposed."""
    decision_s: float
    """Mean."""


def run(law: Law, source: Source, workers: int, seed: int) -> Result:
    """Regret: each rung's best row, its noise apart, above the best of a large random sample; summed."""
    spec = from_dict({**SPACE, "method": source.method, "seeds": [seed], "scaling": {"slots": workers}})
    arena = SpaceArena(FeasibleSet(spec, LawCosts()))
    arena.proposer = source.proposer(arena.feasible)
    arena.proposer.optuna_draws = source.optuna_draws
    fleet, rng = Fleet(((0.0, workers),)), np.random.default_rng(seed)
    state, timeline = simulate(spec, arena, partial(law_row, law), fleet, rng)
    regret = 0.0
    for rung, (flops, best) in enumerate(zip(spec.budget.ladder_flops, best_losses(spec, law), strict=True)):
        row = min(state.rungs[rung].values(), key=lambda row: row["metrics"]["nll"])
        regret += law.loss_of(row["config"], row["params"], flops) - best
    sources = [trial.source for trial in state.trials.values()]
    return Result(regret, sources.count("optuna") / len(sources), float(np.mean(timeline.decision_s)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    columns = [(law, workers) for law in range(len(PLANTED_LAWS)) for workers in options.workers]
    found: dict[tuple[str, int, int], list[Result]] = {}
    begun_s = time.monotonic()
    for law, workers in columns:
        for seed in range(options.seeds):
            for source in SOURCES:
                result = run(PLANTED_LAWS[law], source, workers, seed)
                found.setdefault((source.name, law, workers), []).append(result)
                print(f"{time.monotonic() - begun_s:.0f} s", law + 1, workers, seed, source.name, result, flush=True)
    heads = [f"law {law + 1}, {workers} worker{'s' if workers > 1 else ''}" for law, workers in columns]
    lines = ["| candidates | " + " | ".join(heads) + " | TPE's among trials | ms per decision |"]
    lines += ["|---" * (len(heads) + 3) + "|"]
    for source in SOURCES:
        results = [found[source.name, *column] for column in columns]
        cells = [_mean_and_error([one.regret for one in here]) for here in results]
        every = [one for here in results for one in here]
        taken, took_s = np.mean([one.taken for one in every]), np.mean([one.decision_s for one in every])
        lines.append(f"| {source.name} | " + " | ".join(cells) + f" | {taken:.0%} | {1e3 * took_s:.0f} |")
    head = f"""# Where the frontier policy's candidates come from

Regret summed over three rungs, in nats: the best row's loss under the law (noise of 0.002 apart) above the best of some
2,000 random points. A space of 4 axes (N, s, learning rate, aspect), rungs 1e15 to 1.6e16, a cap of 20 top rungs; mean
over {options.seeds} seeds (standard error), the same ones for every row. Random or QMC draws serve 16 proposals, TPE's
one; TPE knows what is running. Written by `python benchmarks/candidates.py` on {datetime.date.today()}.

"""
    publish("frontier_candidates", head + "\n".join(lines) + "\n\n" + machine("optuna", "numpy", "scipy") + "\n")


def _mean_and_error(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ({np.std(values, ddof=1) / math.sqrt(len(values)):.4f})"


if __name__ == "__main__":
    main()
