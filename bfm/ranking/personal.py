"""The personal floor: what a user had comes back, and what nobody expected of them is popular.

    p_v = (1 - m) pop_v + m sum_i decay^age_i 1[item_i = v] / sum_i decay^age_i

over all events i of the query's known history whose item is in the catalogue; age counts events back from the latest of
them; pop are add-one smoothed training counts. A query without such an event has p = pop. It is a distribution, so it
has an nll. Decay and the share m are those of a small grid with the best nll on the validation part.

V = catalogue items, Q = queries, R = query rows of a chunk, E = events of histories, P = distinct items of histories,
N = targets.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.events.protocol import Protocol, QueryTable, query_targets
from bfm.events.shards import Shards
from bfm.files import canonical_json
from bfm.ragged import chunks, runs
from bfm.ranking.metrics import query_mean
from bfm.ranking.mixed_scores import SparseMass, mixed_block
from bfm.ranking.ranks import Scores

VERSION = 1
DECAYS = (0.9, 0.98, 0.99, 0.998, 1.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_CHOOSING_QUERIES = 2_000
_CHUNK_EVENTS = 1 << 20


@dataclass(frozen=True)
class Personal:
    """How a user's own history is counted, and its share m of the distribution."""

    decay: float
    share: float

    def scores(self, shards: Shards, table: QueryTable) -> Scores:
        """log p of the queries' items; histories are read as their rows are asked for."""
        log_pop_V = torch.from_numpy(log_popularity(shards)).float()

        def scores(rows: slice) -> Callable[[slice], Tensor]:
            shares = _shares(_events(shards, table[rows]), self.decay, shards.num_catalogue)
            log_rest_R = torch.zeros(len(table[rows]))
            log_rest_R[shares.query_P] = math.log1p(-self.share)
            own = dataclasses.replace(shares, mass_P=self.share * shares.mass_P)
            return mixed_block(log_pop_V.__getitem__, log_rest_R, [own])

        return scores


def best_personal(shards: Shards, protocol: Protocol) -> Personal:
    """Decay and share with the best nll on the first headline queries of the validation part; kept."""
    table = protocol.queries("validation")
    table = table[: min(table.num_headline, _CHOOSING_QUERIES)]

    def make() -> bytes:
        losses = {way: 0.0 for way in (Personal(*values) for values in itertools.product(DECAYS, SHARES))}
        for low, high in chunks(table.position + 1, _CHUNK_EVENTS):
            for way, loss in _losses(shards, table[low:high]).items():
                losses[way] += loss
        return canonical_json(dataclasses.asdict(min(losses, key=losses.__getitem__)))

    return Personal(**json.loads(shards.kept(f"personal-v{VERSION}-{protocol.hash[:16]}", make)))


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


def _events(shards: Shards, table: QueryTable) -> _Events:
    length_Q = table.position + 1
    row_E = np.repeat(np.arange(len(table)), length_Q)
    back_E = table.position[row_E] - runs(0, length_Q)
    item_E = shards.item_at(runs(shards.user_starts[table.user], length_Q)).astype(np.int64)
    known_E = item_E < shards.num_catalogue
    row_E, item_E, back_E = row_E[known_E], item_E[known_E], back_E[known_E]
    # Counted from the latest, the weights of a row cannot all vanish.
    latest_Q = np.full(len(table), np.iinfo(np.int64).max)
    np.minimum.at(latest_Q, row_E, back_E)
    return _Events(row_E, item_E, back_E - latest_Q[row_E])


def _shares(events: _Events, decay: float, num_items: int) -> SparseMass:
    """Decayed shares of the items of histories; they sum to 1 in each row that has any."""
    weight_E = decay**events.age_E
    weight_E /= np.bincount(events.row_E, weight_E)[events.row_E]
    row_E, item_E, share_E = map(torch.from_numpy, (events.row_E, events.item_E, weight_E))
    return SparseMass.of(row_E, item_E, share_E.float(), num_items)


def _losses(shards: Shards, table: QueryTable) -> dict[Personal, float]:
    """Summed nll of the queries by every way of counting; only the targets' own probabilities are needed for it."""
    targets, events = query_targets(shards, table), _events(shards, table)
    warm_N = targets.ids < shards.num_catalogue
    popular_V, has_history_Q = np.exp(log_popularity(shards)), np.isin(np.arange(len(table)), events.row_E)
    popular_N = popular_V[np.where(warm_N, targets.ids, 0)]
    losses = {}
    for decay in DECAYS:
        shares = _shares(events, decay, shards.num_catalogue)
        own_N = shares.at(torch.from_numpy(targets.rows), torch.from_numpy(targets.ids)).double().numpy()
        for share in SHARES:
            mixed_N = np.where(has_history_Q[targets.rows], (1 - share) * popular_N + share * own_N, popular_N)
            losses[Personal(decay, share)] = float(np.nansum(query_mean(-np.log(mixed_N), targets, warm_N)))
    return losses
