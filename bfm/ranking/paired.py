"""Differences between rows on the queries that both answered: much of what makes a query hard is common to all models.

Enters: scores per query (metrics.py) of a model or a floor, all workers' merged. Leaves: an .npz, float32 per query
and metric, in a store named by its content; and of two of them the mean difference with its standard error, which is
that of a mean over queries (user-clustered, as a row's own errors are), taken of the differences.

Q = queries, C = common ones that count.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from bfm.errors import CorruptError
from bfm.files import Store, sha256_bytes
from bfm.laws.frontier import Gap, Row
from bfm.ranking.metrics import QueryScores, clustered_error, counted_values

_VALUE, _SHOWN = "value/", "shown/"
_KEPT = 128
"""Rows whose scores a `Pairing` holds at a time; 0.5 MB each at 10,000 queries."""


def scores_object(stem: str, scores: QueryScores) -> tuple[str, bytes]:
    """Name (`<stem>-<hash>.npz`) and content of the object that keeps scores; equal scores have equal names."""
    data = to_npz(scores)
    return f"{stem}-{_seal(data)}.npz", data


def to_npz(scores: QueryScores) -> bytes:
    """Scores as a file, values in float32; what it cost to have them is left out."""
    arrays: dict[str, Any] = {"query": scores.query_Q, "user": scores.user_Q, "basket": scores.basket_Q}
    arrays |= {_VALUE + name: value_Q.astype(np.float32) for name, value_Q in scores.values.items()}
    arrays |= {f"{_SHOWN}{k}": shown_V for k, shown_V in scores.shown.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def from_npz(data: bytes) -> QueryScores:
    """The scores of a file that `to_npz` made."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        values, shown = (
            {key.removeprefix(kind): arrays[key] for key in arrays.files if key.startswith(kind)}
            for kind in (_VALUE, _SHOWN)
        )
        by_k = {int(k): shown_V for k, shown_V in shown.items()}
        return QueryScores(arrays["query"], arrays["user"], arrays["basket"], values, by_k)


def read_scores(store: Store, name: str) -> QueryScores:
    """The scores of an object. Raises FileNotFoundError where there is none, CorruptError where it was altered."""
    data = store.get(name)
    if not name.endswith(f"-{_seal(data)}.npz"):
        raise CorruptError(f"{store.uri}/{name}: truncated or altered; without it differences are unpaired")
    return from_npz(data)


def paired_gap(scores: QueryScores, other: QueryScores, metric: str) -> Gap | None:
    """The mean of `scores` minus that of `other` over the queries that count in both; None below two users."""
    _, first_C, second_C = np.intersect1d(scores.query_Q, other.query_Q, assume_unique=True, return_indices=True)
    gap_C = counted_values(scores, metric)[first_C] - counted_values(other, metric)[second_C]
    used_C = ~np.isnan(gap_C)
    error = clustered_error(gap_C[used_C], scores.user_Q[first_C][used_C])
    return None if error is None else Gap(float(gap_C[used_C].mean()), error, paired=True)


class Pairing:
    """A `Compare` for the rows of one store, each of which names its scores there, and the floors on their queries.

    Nothing is known of rows that name none (imported, simulated), whose scores are gone, or of different protocols.
    """

    def __init__(self, store: Store, floors: Mapping[str, str] | None = None) -> None:
        """`floors`: the names of their scores by floor, which an `other` bears as `floor`."""
        self._store, self._floors = store, floors or {}
        self._read = functools.lru_cache(_KEPT)(self._find)
        self._told = functools.cache(self._pair)

    def __call__(self, row: Row, other: Row, metric: str) -> Gap | None:
        """The row's value minus the other's. Raises CorruptError where scores were altered."""
        name = row.get("scores")
        if not name:
            return None
        beside = other.get("scores") or self._floors.get(other.get("floor", ""))
        if not beside or row.get("protocol_hash") != other.get("protocol_hash"):
            return None
        return self._told(name, beside, metric)

    def _pair(self, name: str, other: str, metric: str) -> Gap | None:
        scores, others = self._read(name), self._read(other)
        return None if scores is None or others is None else paired_gap(scores, others, metric)

    def _find(self, name: str) -> QueryScores | None:
        try:
            # What is shown makes no difference, and is as large as the catalogue.
            return dataclasses.replace(read_scores(self._store, name), shown={})
        except FileNotFoundError:
            return None


def _seal(data: bytes) -> str:
    return sha256_bytes(data)[:16]
