"""Rows of a real sweep beyond a C, foretold by the joint law of the rows up to it.

    python benchmarks/foretold.py complete_journey=DIR/complete_journey:1e11 synthetic=DIR/synthetic:1e12

No run is trained: the rows stand in the ledgers of `real_laws.py run`. Beside the law stands what anyone would say
without one: that a run reaches what the nearest size reached at the last C. Writes results/foretold.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from common import machine, publish
from real_laws import METRICS

from bfm.laws.frontier import by_rung, rung_rows
from bfm.laws.joint import fit_joint
from bfm.laws.runs import Runs, from_rows
from bfm.laws.transform import to_loss
from bfm.sweep.ledger.study import joined, read_sweeps
from bfm.units import format_flops

TOLERANCE = 1.01
"""C of a row over that of its rung, at most."""


@dataclass(frozen=True)
class Held:
    """Rows of one C and metric that the law has not seen, in losses; shape R."""

    flops: float
    params_R: np.ndarray
    loss_R: np.ndarray
    foretold_R: np.ndarray
    half_R: np.ndarray
    """Half widths of the 95 % prediction intervals."""
    unchanged_R: np.ndarray
    """What the nearest size reached at the last C that the law has seen."""

    @property
    def inside(self) -> int:
        """How many are in their interval."""
        return int((np.abs(self.loss_R - self.foretold_R) <= self.half_R).sum())

    def rms(self, said_R: np.ndarray) -> float:
        """Root mean square distance from what was said of them."""
        return float(np.sqrt(np.mean((self.loss_R - said_R) ** 2)))


def held(study: str, below: float, metric: str) -> Iterator[Held]:
    """Of the sweeps of N against C, the budgets beyond `below`."""
    sweeps = [sweep for sweep in read_sweeps(study) if sweep.has_begun and sweep.axis == "allocation"]
    rows = rung_rows(joined(sweeps))
    known = from_rows([row for row in rows if row["rung_flops"] <= TOLERANCE * below], metric)
    law = fit_joint(known)
    for flops, here in by_rung(rows).items():
        if flops <= TOLERANCE * below:
            continue
        runs = from_rows(here, metric)
        foretold_R, half_R = law.predict({name: runs[name] for name in (*law.columns, "unique_events")})
        loss_R = to_loss(metric, runs["loss"])
        yield Held(flops, runs["params"], loss_R, foretold_R, half_R, unchanged(known, runs["params"]))


def unchanged(known: Runs, params_R: np.ndarray) -> np.ndarray:
    """The mean loss of the nearest size at the largest C."""
    last = known.select(known["flops"] > known["flops"].max() / TOLERANCE**2)
    sizes, loss = np.log(last["params"]), to_loss(last.metric, last["loss"])
    nearest_R = [np.abs(sizes - np.log(params)) for params in params_R]
    return np.array([loss[np.isclose(far, far.min())].mean() for far in nearest_R])


def table(name: str, study: str, below: float) -> list[str]:
    """Lines of one log."""
    lines, total, count = [], 0, 0
    for metric in METRICS:
        for found in held(study, below, metric):
            rows = len(found.loss_R)
            total, count = total + found.inside, count + rows
            lines.append(
                f"| {name} | {metric} | {format_flops(found.flops)}, {found.flops / below:.0f} times | "
                f"{found.inside} of {rows} | {np.median(found.half_R):.4f} | "
                f"{np.mean(found.loss_R - found.foretold_R):+.4f} | {found.rms(found.foretold_R):.4f} | "
                f"{found.rms(found.unchanged_R):.4f} |"
            )
    lines.append(f"| {name} | all | beyond {format_flops(below)} | {total} of {count} | | | | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="NAME=STUDY:FLOPS", help="FLOPS: the largest C the law sees")
    lines: list[str] = []
    for text in parser.parse_args().studies:
        name, _, place = text.partition("=")
        study, _, below = place.rpartition(":")
        lines += table(name, study, float(below))
    about = (
        "Rows of the allocation sweeps beyond a C, foretold by the joint law of those up to it; in losses (of a "
        "ranking metric -ln of it), measured less foretold. Rows of one C share their budget, some their trial, and "
        "so part of their error. `no change`: a run reaches what the nearest size reached at the last C."
    )
    heads = "| log | metric | C | inside 95 % | half width | mean off | rms | rms of no change |"
    head = ["# Rows beyond a C, foretold", "", about, "", heads, "|---|---|---|---|---|---|---|---|"]
    publish("foretold", "\n".join([*head, *lines, "", machine("numpy", "scipy"), ""]))


if __name__ == "__main__":
    main()
