"""Is the order inside ties in time monotone in some column? Then a model that sees that order learns sorting.

Packagers sort inside baskets: in such a log the next row's product id is larger than this one's. `data prepare`
measures this on the raw order, before it orders ties by a seeded hash, and `data describe` prints the warning.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MONOTONE_SHARE = 0.9
_FEWEST_PAIRS = 50


@dataclass(frozen=True)
class TieCounts:
    """Neighbouring rows of one user with the same time, counted; counts of parts of a log add up."""

    pairs: int = 0
    """Tied neighbouring pairs (of all neighbouring pairs of the same user: `neighbours`)."""
    neighbours: int = 0
    """Neighbouring pairs of the same user."""
    ascending: Counter[str] = field(default_factory=Counter)
    """Column -> tied pairs whose value rises."""
    descending: Counter[str] = field(default_factory=Counter)
    """Column -> tied pairs whose value falls."""

    def __add__(self, other: TieCounts) -> TieCounts:
        """Counts of two parts of a log."""
        return TieCounts(*map(operator.add, vars(self).values(), vars(other).values()))

    def ascending_share(self) -> dict[str, float]:
        """Column -> rising share of the tied pairs that differ in it (0.5 = no order); absent where none differs."""
        return {name: self.ascending[name] / count for name, count in sorted(self._different().items())}

    def warning(self) -> str | None:
        """One sentence that names the monotone columns; None where there are none (or hardly any ties)."""
        total, found = self._different(), []
        for name, share in self.ascending_share().items():
            if total[name] >= _FEWEST_PAIRS and max(share, 1 - share) >= _MONOTONE_SHARE:
                found.append(f"{name} {'rises' if share > 0.5 else 'falls'} in {max(share, 1 - share):.1%}")
        if not found:
            return None
        return (
            f"the raw order inside ties is monotone: of the pairs that differ, {', '.join(found)}; "
            "a model that saw this order would learn sorting, so ties were ordered by a seeded hash"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able figures for the manifest's checks."""
        return {
            "pairs": self.pairs,
            "share": self.pairs / max(self.neighbours, 1),
            "ascending_share": {name: round(share, 6) for name, share in self.ascending_share().items()},
            "warning": self.warning(),
        }

    def _different(self) -> Counter[str]:
        """Column -> tied pairs that differ in it."""
        return self.ascending + self.descending


def tie_monotonicity(user: np.ndarray, time: np.ndarray, columns: Mapping[str, pa.Array]) -> TieCounts:
    """Count rising and falling values among tied neighbours.

    Args:
        user, time: [n], sorted by user and then time (ties in the order that is to be judged).
        columns: name -> [n] of an ordered type; missing values are left out.
    """
    same_user = user[1:] == user[:-1]
    tied = np.flatnonzero(same_user & (time[1:] == time[:-1]))
    before, after = pa.array(tied), pa.array(tied + 1)
    ascending, descending = Counter[str](), Counter[str]()
    for name, values in columns.items():
        left, right = values.take(before), values.take(after)
        ascending[name] = pc.sum(pc.less(left, right), min_count=0).as_py()
        descending[name] = pc.sum(pc.greater(left, right), min_count=0).as_py()
    return TieCounts(len(tied), int(np.count_nonzero(same_user)), ascending, descending)
