"""Scores of a distribution that mixes a softmax with sparse distributions: log p of any block of queries and items.

    p_v = g e^{s_v} / sum_u e^{s_u} + sum_x m_xv          g the softmax's gate, m what the sparse components give

Enters: the softmax's scores, its gates, and components that give few items per query a mass of their own. Leaves: a
`Scores` (ranks.py), log p. g and the masses of a query sum to one over the catalogue.

Q = queries, R = query rows of a chunk, C = items of a block, P = pairs of a query and an item, N = pairs asked for,
M = last events of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfm.events.neighbours import Neighbours
from bfm.model.blocks import add_rows
from bfm.ranking.ranks import DotScores, Pairs, pass_on


@dataclass(frozen=True)
class SparseMass:
    """Distinct (query, item) pairs with their probability, by rising query and item."""

    query_P: Tensor
    """int64."""
    item_P: Tensor
    """int64."""
    mass_P: Tensor
    """float32, positive."""

    @classmethod
    def of(cls, query_P: Tensor, item_P: Tensor, mass_P: Tensor, num_items: int) -> SparseMass:
        """From pairs in any order; those of a query and an item are added up, items from num_items on left out."""
        kept = ((mass_P > 0) & (item_P < num_items)).nonzero()[:, 0]
        key_P, place_P = torch.unique(query_P[kept] * num_items + item_P[kept], return_inverse=True)
        total_P = torch.zeros(len(key_P), device=mass_P.device)
        add_rows(total_P, place_P, mass_P[kept])
        return cls(key_P // num_items, key_P % num_items, total_P)

    @classmethod
    def join(cls, parts: Sequence[SparseMass], device: torch.device) -> SparseMass:
        """The pairs of runs of queries that follow each other."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(
            torch.cat([none, *(part.query_P for part in parts)]),
            torch.cat([none, *(part.item_P for part in parts)]),
            torch.cat([none.float(), *(part.mass_P for part in parts)]),
        )

    def of_rows(self, rows: slice) -> SparseMass:
        """The pairs of some queries, these counted from 0."""
        here = _between(self.query_P, rows)
        return SparseMass(self.query_P[here] - rows.start, self.item_P[here], self.mass_P[here])

    def by_item(self) -> tuple[Pairs, Tensor]:
        """The same pairs by rising item, for blocks of items, and their mass."""
        order = self.item_P.argsort(stable=True)
        item_P = self.item_P[order]
        return Pairs(self.query_P[order], item_P, item_P.cpu().numpy()), self.mass_P[order]

    def totals(self, num_queries: int) -> Tensor:
        """Mass of every query [Q]."""
        total_Q = torch.zeros(num_queries, device=self.mass_P.device)
        add_rows(total_Q, self.query_P, self.mass_P)
        return total_Q

    def at(self, query_N: Tensor, item_N: Tensor) -> Tensor:
        """Mass of any pairs, 0 where there is none."""
        if len(self.mass_P) == 0:
            return torch.zeros(item_N.shape, device=item_N.device)
        stride = int(max(self.item_P.max(), item_N.max() if item_N.numel() else 0)) + 1
        key_P, key_N = self.query_P * stride + self.item_P, query_N * stride + item_N
        place_N = torch.searchsorted(key_P, key_N).clamp(max=len(key_P) - 1)
        return torch.where(key_P[place_N] == key_N, self.mass_P[place_N], 0.0)


class NeighbourMass:
    """Last events of queries share out a mass among counted neighbours; pairs are made as their rows are asked for."""

    def __init__(self, neighbours: Neighbours, item_QM: Tensor, mass_QM: Tensor) -> None:
        """item_QM: ids of last events, -1 where they have no neighbours; mass_QM: what each shares out, else 0."""
        self._neighbours, self._item_QM, self._mass_QM = neighbours, item_QM.cpu().numpy(), mass_QM

    def of_rows(self, rows: slice) -> SparseMass:
        """The pairs of some queries, these counted from 0."""
        table, item_RM, device = self._neighbours, self._item_QM[rows], self._mass_QM.device
        row_N, age_N = (item_RM >= 0).nonzero()
        item_N = item_RM[row_N, age_N]
        place_S, from_S = table.spread(item_N)
        share_S = table.weight_P[place_S] / table.total_V[item_N][from_S].astype(np.float32)
        row_S, age_S, neighbour_S, share_S = (
            torch.from_numpy(values).to(device)
            for values in (row_N[from_S], age_N[from_S], table.lists.ids[place_S].astype(np.int64), share_S)
        )
        mass_S = share_S * self._mass_QM[rows][row_S, age_S]
        return SparseMass.of(row_S, neighbour_S, mass_S, len(table.lists))

    def at(self, query_N: Tensor, item_N: Tensor) -> Tensor:
        """Mass of any pairs, 0 where there is none."""
        query, item = query_N.cpu().numpy(), item_N.cpu().numpy()
        share_NM = torch.from_numpy(self._neighbours.shares(self._item_QM[query], item[..., None]))
        return (share_NM.to(self._mass_QM) * self._mass_QM[query_N]).sum(-1)


Component = SparseMass | NeighbourMass
"""A sparse distribution of every query, its gate included."""


class MixtureScores:
    """Scores that are log p."""

    def __init__(self, softmax: DotScores, log_gate_Q: Tensor, components: Sequence[Component]) -> None:
        self._softmax, self._components = softmax, components
        self.finite, self.device = softmax.finite, softmax.device
        """No score can be NaN or infinite."""
        self.shift_Q = log_gate_Q - _log_totals(softmax, len(log_gate_Q))
        """What makes a score of the softmax its share of log p."""

    def __call__(self, rows: slice) -> Callable[[slice], Tensor]:
        """log p of some queries."""
        masses = [component.of_rows(rows) for component in self._components]
        return mixed_block(self._softmax(rows), self.shift_Q[rows], masses)


def mixed_block(
    dense: Callable[[slice], Tensor], shift_R: Tensor, masses: Sequence[SparseMass]
) -> Callable[[slice], Tensor]:
    """log p of any items for a chunk of queries: e^(dense + shift), and the masses of the chunk beside it.

    dense: items -> scores [R, C], or [C] where they are the same for all queries.
    """
    sparse = [(pairs, mass_P.log()) for pairs, mass_P in (mass.by_item() for mass in masses)]

    def block(items: slice) -> Tensor:
        log_p_RC = dense(items) + shift_R[:, None]
        for pairs, log_mass_P in sparse:
            here, at = pairs.inside(items)
            log_p_RC[at] = torch.logaddexp(log_p_RC[at], log_mass_P[here])
        return log_p_RC

    return block


def _between(rising_P: Tensor, bounds: slice) -> slice:
    """The run of rising numbers from bounds.start to before bounds.stop."""
    return slice(*torch.searchsorted(rising_P, torch.tensor([bounds.start, bounds.stop]).to(rising_P)).tolist())


def _log_totals(scores: DotScores, num_queries: int) -> Tensor:
    """log sum over the catalogue of e^score of every query [Q], in blocks of bounded size."""
    rows, columns = pass_on(scores.device).block_shape(num_queries, scores.num_items)
    totals = []
    for start in range(0, num_queries, rows):
        softmax = scores(slice(start, min(start + rows, num_queries)))
        blocks = (slice(low, min(low + columns, scores.num_items)) for low in range(0, scores.num_items, columns))
        totals.append(torch.logsumexp(torch.stack([softmax(items).logsumexp(1) for items in blocks]), 0))
    return torch.cat([torch.zeros(0, device=scores.device), *totals])
