"""The personal floor: what a user had comes back, and what nobody expected of them is popular.

    p_v = (1 - m) pop_v + m sum_i decay^age_i 1[item_i = v] / sum_i decay^age_i

over all events i of the query's known history whose item is in the catalogue; age counts events back from the latest of
them; pop are add-one smoothed training counts. A query without such an event has p = pop. It is a distribution, so it
has an nll. Decay and the share m are those of a small grid with the best nll on the validation part.

V = catalogue items, Q = queries, R = query rows of a chunk, E = events of histories, P = distinct items of histories,
N = targets.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.events.derived import load_derived, save_derived
from bfm.events.protocol import Protocol, QueryTable, query_targets
from bfm.events.shards import Shards, user_chunks
from bfm.files import canonical_json
from bfm.ranking.metrics import query_mean
from bfm.ranking.ranks import ScoreBlock, kept_per_thread

VERSION = 1
DECAYS = (0.9, 0.98, 0.99, 0.998, 1.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_CHOOSING_QUERIES = 2_000
_CHUNK_EVENTS = 1 << 20


@dataclass(frozen=True)
class Personal:
    """How a user's own history is counted, and its share m of the distribution."""

    decay: float = 1.0
    share: float = 0.5

    def scores(self, shards: Shards, table: QueryTable) -> ScoreBlock:
        """log p of the queries' items; histories are read as their rows are asked for."""
        log_pop_V = torch.from_numpy(log_popularity(shards)).float()
        log_share = math.log(self.share)

        def mixed(rows: slice) -> tuple[Tensor, _Counts]:
            counts = _counts(_events(shards, table[rows]), self.decay)
            log_rest_R = torch.zeros(len(table[rows]))
            log_rest_R[counts.row_P] = math.log1p(-self.share)
            return log_rest_R, counts

        mixed_rows = kept_per_thread(mixed)

        def block(rows: slice, items: slice) -> Tensor:
            log_rest_R, counts = mixed_rows(rows)
            log_p_RC = log_pop_V[items] + log_rest_R[:, None]
            found = slice(*np.searchsorted(counts.item_P, [items.start, items.stop]))
            at = torch.from_numpy(counts.row_P[found]), torch.from_numpy(counts.item_P[found] - items.start)
            own_P = torch.from_numpy(np.log(counts.weight_P[found]) + log_share).float()
            log_p_RC[at] = torch.logaddexp(log_p_RC[at], own_P)
            return log_p_RC

        return block


def best_personal(shards: Shards, protocol: Protocol) -> Personal:
    """Decay and share with the best nll on the first headline queries of the validation part. Cached."""
    table = protocol.queries("validation")
    table = table[: min(table.num_headline, _CHOOSING_QUERIES)]
    if len(table) == 0:
        return Personal()
    name = f"personal-v{VERSION}-{protocol.hash[:16]}"
    cached = load_derived(shards, name)
    if cached is not None:
        return Personal(**json.loads(cached))
    losses = {way: 0.0 for way in (Personal(*values) for values in itertools.product(DECAYS, SHARES))}
    for low, high in itertools.pairwise(user_chunks(table.position + 1, _CHUNK_EVENTS)):
        for way, loss in _losses(shards, table[low:high]).items():
            losses[way] += loss
    best = min(losses, key=losses.__getitem__)
    save_derived(shards, name, canonical_json(asdict(best)))
    return best


def log_popularity(shards: Shards) -> NDArray[np.float64]:
    """Add-one smoothed log shares of the training events [V]."""
    smoothed_V = shards.train_counts + 1.0
    return np.log(smoothed_V / smoothed_V.sum())


class _Events(NamedTuple):
    """Catalogue items of known histories."""

    row_E: NDArray[np.int64]
    item_E: NDArray[np.int64]
    age_E: NDArray[np.int64]
    """Events back from the row's latest of them."""


class _Counts(NamedTuple):
    """Decayed shares of the items of histories, by rising item; they sum to 1 in each row that has any."""

    row_P: NDArray[np.int64]
    item_P: NDArray[np.int64]
    weight_P: NDArray[np.float64]


def _events(shards: Shards, table: QueryTable) -> _Events:
    length_Q = table.position + 1
    row_E = np.repeat(np.arange(len(table)), length_Q)
    back_E = np.repeat(np.cumsum(length_Q), length_Q) - 1 - np.arange(len(row_E))
    last_E = (shards.user_starts[table.user] + table.position)[row_E]
    item_E = shards.take_item(shards.locate(last_E - back_E)).astype(np.int64)
    known_E = item_E < shards.num_catalogue
    row_E, item_E, back_E = row_E[known_E], item_E[known_E], back_E[known_E]
    # Counted from the latest, the weights of a row cannot all vanish.
    latest_Q = np.full(len(table), np.iinfo(np.int64).max)
    np.minimum.at(latest_Q, row_E, back_E)
    return _Events(row_E, item_E, back_E - latest_Q[row_E])


def _counts(events: _Events, decay: float) -> _Counts:
    num_rows = int(events.row_E.max(initial=0)) + 1
    weight_E = decay**events.age_E
    weight_E /= np.bincount(events.row_E, weight_E, num_rows)[events.row_E]
    key_P, place_E = np.unique(events.item_E * num_rows + events.row_E, return_inverse=True)
    item_P, row_P = np.divmod(key_P, num_rows)
    return _Counts(row_P, item_P, np.bincount(place_E, weight_E, len(key_P)).astype(np.float64))


def _losses(shards: Shards, table: QueryTable) -> dict[Personal, float]:
    """Summed nll of the queries by every way of counting; only the targets' own probabilities are needed for it."""
    targets, events = query_targets(shards, table), _events(shards, table)
    warm_N = targets.ids < shards.num_catalogue
    query_N = np.repeat(np.arange(len(table)), np.diff(targets.offsets))
    popular_V, has_history_Q = np.exp(log_popularity(shards)), np.isin(np.arange(len(table)), events.row_E)
    popular_N = popular_V[np.where(warm_N, targets.ids, 0)]
    losses = {}
    for decay in DECAYS:
        own_N = _looked_up(_counts(events, decay), query_N, targets.ids)
        for share in SHARES:
            mixed_N = np.where(has_history_Q[query_N], (1 - share) * popular_N + share * own_N, popular_N)
            losses[Personal(decay, share)] = float(np.nansum(query_mean(-np.log(mixed_N), targets, warm_N)))
    return losses


def _looked_up(counts: _Counts, row_N: NDArray[np.int64], item_N: NDArray[np.int32]) -> NDArray[np.float64]:
    """Weights of some (row, item), every row among them; 0 where the row has no such item."""
    width = 1 + int(row_N.max(initial=0))
    # A last key that nothing equals, so that every search ends inside.
    key_P = np.append(counts.item_P * width + counts.row_P, -1)
    key_N = item_N * width + row_N
    place_N = np.searchsorted(key_P[:-1], key_N)
    return np.where(key_P[place_N] == key_N, np.append(counts.weight_P, 0.0)[place_N], 0.0)
