"""Time of one draw of K negatives from catalogues of 1e4, 1e6 and 1e7 items, beside a pass over the catalogue.

    python benchmarks/draws.py

Popularity is a power law of exponent 1, pi grows with its power 0 or 0.75. The pass over the catalogue is the least
that a scheme needs which looks at every item: one random number each, compared with pi. Minimum of 7, interleaved, one
thread. Writes benchmarks/results/draws.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import machine, publish
from bfm.objective.sampling import Proposal, drawn_inclusion, group_rng

SIZES, NEGATIVES, EXPONENTS, RUNS = (10**4, 10**6, 10**7), (10**2, 10**3, 10**4, 10**5), (0.0, 0.75), 7


def timed_ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def line(num_items: int, negatives: int, exponent: float) -> str:
    popularity_V = 10**9 // np.arange(1, num_items + 1)
    pi_V = drawn_inclusion(popularity_V, negatives, exponent)
    proposal, rng = Proposal.of(pi_V), np.random.default_rng(0)
    draws, passes = zip(
        *(
            (
                timed_ms(lambda group=group: proposal.draw(group_rng(0, group))),
                timed_ms(lambda: np.flatnonzero(rng.random(num_items) < pi_V)),
            )
            for group in range(RUNS)
        ),
        strict=True,
    )
    return (
        f"| {num_items:,} | {negatives:,} | {exponent:g} | {min(draws):.2f} ({np.median(draws):.2f}) "
        f"| {min(passes):.2f} | {min(passes) / min(draws):.1f} |"
    )


def main() -> None:
    rows = [line(*sizes) for sizes in ((v, k, a) for v in SIZES for k in NEGATIVES for a in EXPONENTS if k < v)]
    head = [
        "# The time of a draw",
        "",
        "Written by `python benchmarks/draws.py`: ms of one draw, minimum (median) of 7, and of one pass over the",
        "catalogue that compares a random number with every pi.",
        "",
        "| items | K | exponent | draw, ms | pass over the catalogue, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    publish("draws", "\n".join([*head, *rows, "", machine("numpy"), ""]))


if __name__ == "__main__":
    main()
