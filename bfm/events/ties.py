"""Is the order inside ties in time monotone in some column? Then a model that sees that order learns sorting.

Packagers sort inside baskets: in such a log the next row's product id is larger than this one's. `data prepare`
measures this on the raw order, before it orders ties by a seeded hash, and `data describe` prints the warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MONOTONE_SHARE = 0.9
_FEWEST_PAIRS = 50

Ties = Counter[tuple[str, str]]
"""Counts of a part of a log; those of parts add up. Of pairs of neighbouring rows of one user ("neighbours", ""), those
with the same time ("tied", ""), and of these per column ("rises", column) and ("falls", column)."""


def count_ties(user: np.ndarray, time: np.ndarray, columns: Mapping[str, pa.Array]) -> Ties:
    """Count rising and falling values among tied neighbours.

    Args:
        user, time: [n], sorted by user and then time (ties in the order that is to be judged).
        columns: name -> [n] of an ordered type; missing values are left out.
    """
    same_user = user[1:] == user[:-1]
    tied = same_user & (time[1:] == time[:-1])
    ties = Ties({("neighbours", ""): int(np.count_nonzero(same_user)), ("tied", ""): int(np.count_nonzero(tied))})
    for name, values in columns.items():
        for what, compare in (("rises", pc.less), ("falls", pc.greater)):
            found = pc.and_(compare(values[:-1], values[1:]), pa.array(tied))
            ties[what, name] = pc.sum(found, min_count=0).as_py()
    return ties


def tie_facts(ties: Ties) -> dict[str, Any]:
    """JSON-able: tied pairs, their share of the neighbours, and what tells whether they are sorted.

    `ascending_share`: column -> rising share of the tied pairs that differ in it (0.5: no order); absent where none
    differs. `warning`: one sentence that names the monotone columns; None where there are none, or hardly any ties.
    """
    differ = {name: ties["rises", name] + ties["falls", name] for name in sorted({name for _, name in ties if name})}
    rising = {name: ties["rises", name] / count for name, count in differ.items() if count}
    monotone = [
        f"{name} {'rises' if share > 0.5 else 'falls'} in {max(share, 1 - share):.1%}"
        for name, share in rising.items()
        if differ[name] >= _FEWEST_PAIRS and max(share, 1 - share) >= _MONOTONE_SHARE
    ]
    warning = (
        f"the raw order inside ties is monotone: of the pairs that differ, {', '.join(monotone)}; "
        "a model that saw this order would learn sorting, so ties were ordered by a seeded hash"
    )
    return {
        "pairs": ties["tied", ""],
        "share": ties["tied", ""] / max(ties["neighbours", ""], 1),
        "ascending_share": {name: round(share, 6) for name, share in rising.items()},
        "warning": warning if monotone else None,
    }
