"""A model's distribution interpolated with counted neighbours: what a factorised score forgets, a table remembers.

    p_v = (1 - a) e^{s_v} / sum_u e^{s_u} + a m_v / sum_u m_u

s are the model's scores, m the neighbour scores of the query's last events (neighbours.py), a is the memory's share.
A query none of whose events has neighbours keeps the model's distribution. Nothing is trained, and N, D and C stay the
model's own. As n-gram models are interpolated (Jelinek, Mercer 1980), and neural ones with their training data
(kNN-LM, Khandelwal et al. 2020).

Q = queries, R = query rows of a chunk, C = items of a block, P = items of a block that some event points to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bfm.errors import UserError
from bfm.events.protocol import QueryTable, Ragged
from bfm.events.shards import Shards
from bfm.ranking.evaluate import Encoded
from bfm.ranking.metrics import summarise
from bfm.ranking.neighbours import Counting, Neighbours, NeighbourScores
from bfm.ranking.ranks import ScoreBlock

AUTO = "auto"
"""The share with the best ndcg@10 on the validation part."""
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""What `auto` chooses from."""
_ROWS = 256
_COLUMNS = 8192


def parse_share(text: str) -> float | None:
    """A share of 0 to under 1, or None for `auto`. Raises UserError for anything else."""
    if text == AUTO:
        return None
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 <= share < 1.0:
        raise UserError(f"{text!r} is no share", key="--memory", fix="use auto or a number from 0 to under 1")
    return share


@dataclass(frozen=True)
class Memory:
    """Neighbours and their share of the distribution."""

    neighbours: Neighbours
    share: float

    def beside(self, scores: ScoreBlock, shards: Shards, table: QueryTable) -> ScoreBlock:
        """log p of the queries' items, from the model's scores of all catalogue items; those themselves at share 0."""
        return scores if self.share == 0.0 else _Mixture(scores, self.neighbours, shards, table).at(self.share)

    def facts(self) -> dict[str, Any]:
        """What a reader wants to know of it, as JSON."""
        return {"share": self.share, "counting": asdict(self.neighbours.counting)}

    def tensors(self) -> dict[str, Tensor]:
        """The table of neighbours; with `facts`, all that `of` needs."""
        lists = self.neighbours.lists
        arrays = {"ids": lists.ids, "offsets": lists.offsets, "weight": self.neighbours.weight}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Memory:
        """The memory of which these are the `tensors` and the `facts`."""
        lists = Ragged(tensors["ids"].numpy(), tensors["offsets"].numpy())
        neighbours = Neighbours(lists, tensors["weight"].numpy(), Counting(**facts["counting"]))
        return cls(neighbours, float(facts["share"]))


def choose_share(encoded: Encoded, shards: Shards, neighbours: Neighbours) -> float:
    """The share of SHARES with the best ndcg@10 on encoded queries, of the validation part that is."""
    scores = encoded.scorer
    mixture = _Mixture(scores, neighbours, shards, encoded.table)

    def ndcg(share: float) -> float:
        ranked = encoded.ranked(mixture.at(share) if share else scores)
        # A part of baskets alone has no headline metrics.
        return summarise(ranked).metrics.get("ndcg@10", 0.0)

    return max(SHARES, key=ndcg)


class _Mixture:
    """A model and its neighbours on some queries; a ScoreBlock of log p at every share."""

    def __init__(self, scores: ScoreBlock, neighbours: Neighbours, shards: Shards, table: QueryTable) -> None:
        self._model, self._memory = scores, NeighbourScores(neighbours, shards, table)
        self._weight_Q = torch.from_numpy(self._memory.totals())
        self._log_total_Q = _log_totals(scores, len(table), len(neighbours.lists))

    def at(self, share: float) -> ScoreBlock:
        """log p with this share of the memory, above 0."""
        known_Q = self._weight_Q > 0
        per_weight_Q = torch.where(known_Q, share / self._weight_Q, 0.0)
        log_rest_Q = torch.where(known_Q, math.log1p(-share), 0.0)

        def block(rows: slice, items: slice) -> Tensor:
            log_p_RC = self._model(rows, items)
            device = log_p_RC.device
            log_p_RC += (log_rest_Q[rows].to(device) - self._log_total_Q[rows])[:, None]
            row_P, column_P, score_P = map(torch.from_numpy, self._memory.pairs(rows, items))
            share_P = score_P * per_weight_Q[rows][row_P]
            at = row_P.to(device), column_P.to(device)
            log_p_RC[at] = torch.logaddexp(log_p_RC[at], share_P.log().to(log_p_RC))
            return log_p_RC

        return block


def _log_totals(scores: ScoreBlock, num_queries: int, num_items: int) -> Tensor:
    """log sum over the catalogue of e^score of every query [Q], in blocks of bounded size."""
    totals = []
    for start in range(0, num_queries, _ROWS):
        rows = slice(start, min(start + _ROWS, num_queries))
        blocks = (slice(low, min(low + _COLUMNS, num_items)) for low in range(0, num_items, _COLUMNS))
        totals.append(torch.logsumexp(torch.stack([scores(rows, items).logsumexp(1) for items in blocks]), 0))
    return torch.cat(totals) if totals else torch.zeros(0)
