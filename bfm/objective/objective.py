"""What a training step minimises: the mean over its negative groups of each group's mean loss over its targets.

Enters: the two-part model and a batch of whole groups. Leaves: one scalar. A group's candidates and its loss depend
on that group alone, so the value and the gradient do not depend on how groups are split into micro-batches or workers
(each of which holds equally many groups).

The candidates of a group are its distinct targets and, on request, items drawn for it. So a target stands among them,
with certainty, and its loss needs no more than its own score and the sum that all targets of a query share:

    loss_t = log sum_k e^{s_k - log pi_k} - s_t,     s_k = scale <h, v_k>

pi_k is the chance of k to be a candidate of this query (own_window_certain), so the sum is an unbiased one
(softmax.py).

In stage 1 both parts are trained and what is drawn is embedded with the group; in stage 2 item vectors are rows of the
frozen catalogue.

U = distinct items of the batch's groups, Q = queries, T = targets, V = catalogue items, K = candidates of a group,
G = windows of a group, X = sparse components of the mixture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import UserError
from bfm.model.batch import NO_ITEMS, ModelBatch
from bfm.model.blocks import look_up
from bfm.model.mixture import mixture_loss, target_mass
from bfm.model.two_part import TwoPartModel
from bfm.objective.frozen import FrozenItems
from bfm.objective.sampling import Proposal, drawn_inclusion, group_rng, mix_inclusion
from bfm.objective.softmax import log_sum


@dataclass(frozen=True)
class TargetLosses:
    """Loss and gates of a batch's targets, without a gradient."""

    loss_T: Tensor
    log_gate_TX1: Tensor

    def sums(self, batch: ModelBatch) -> Tensor:
        """Weighted sums of loss, one and gates over basket and over headline targets, [2, 2 + X + 1].

        Headline targets have a later timestamp than their query, as those of headline queries in evaluation.
        """
        headline_T = batch.places.take(batch.later_RL)[batch.query_T].to(self.loss_T.dtype)
        kind_2T = torch.stack([1.0 - headline_T, headline_T]) * batch.weight_T
        one_T1 = torch.ones_like(headline_T)[:, None]
        return kind_2T @ torch.cat([self.loss_T[:, None], one_T1, self.log_gate_TX1.exp()], 1)


class Objective:
    """The mean loss of a batch's groups, and its candidates."""

    last: TargetLosses
    """Of the last batch."""

    def __init__(
        self,
        log_pi_batch_V: Tensor,
        popularity_V: NDArray[np.integer],
        negatives: int,
        exponent: float,
        seed: int,
        *,
        items: FrozenItems | None = None,
        method: str = "auto",
    ) -> None:
        """Fix what is drawn for a group: `negatives` items, with pi = min(1, c * popularity^exponent).

        log_pi_batch_V: log of the chance that another window of the group has each catalogue item as a target, on the
        model's device; items: the vectors of stage 2, None in stage 1; method: of `log_sum` over the group's targets
        and over what is drawn in stage 1.
        Raises UserError where `negatives` is above V, or V below 2.
        """
        num_items = len(log_pi_batch_V)
        if num_items < 2:
            raise UserError(
                f"a catalogue of {num_items} item{'s' if num_items != 1 else ''} has no negative for any target",
                key="item",
                fix="train on a log with more items before the split",
            )
        self.seed, self.items, self.method = seed, items, method
        drawn_pi_V = drawn_inclusion(popularity_V, negatives, exponent) if negatives else np.zeros(num_items)
        self.proposal = Proposal.of(drawn_pi_V)
        self.pi_V = mix_inclusion(log_pi_batch_V.double().exp().cpu().numpy(), drawn_pi_V)
        self.log_pi_V = torch.from_numpy(self.pi_V).log().to(log_pi_batch_V)
        # Of groups that were counted and are still to be trained on: a draw passes over the whole catalogue.
        self._counted: dict[int, Tensor] = {}

    def embedded(self, group_index: int) -> NDArray[np.int64]:
        """Item ids that are embedded with a group as further candidates."""
        return NO_ITEMS if self.items is not None else self._draw(group_index)

    def candidates(self, batch: ModelBatch) -> list[int]:
        """Candidates of each group."""
        if self.items is None:
            return [group.candidates for group in batch.groups]
        drawn = {group.index: self._frozen_candidates(batch, place) for place, group in enumerate(batch.groups)}
        self._counted |= drawn
        return [group.candidates + len(drawn[group.index]) for group in batch.groups]

    def __call__(self, model: TwoPartModel, batch: ModelBatch) -> Tensor:
        """Mean over groups of the weighted mean over their targets; a group without targets counts as zero."""
        v_UD = model.embed_items(batch.items_U) if self.items is None else self.items.vectors(batch.items_U)
        queries = model.contextualize(batch, v_UD)
        q_QD = model.scale * queries.h_QD
        log_sum_Q = torch.cat([self._log_sum(batch, group, q_QD, v_UD) for group in range(len(batch.groups))])
        score_T = (look_up(q_QD, batch.query_T) * look_up(v_UD, batch.target_index_T)).sum(-1)
        softmax_T = look_up(log_sum_Q[:, None], batch.query_T).squeeze(-1) - score_T
        loss_T = mixture_loss(softmax_T, queries.log_gate_TX1, target_mass(batch, queries))
        self.last = TargetLosses(loss_T.detach(), queries.log_gate_TX1.detach())
        # The last group of a small log may hold no target, and its mean would be NaN.
        weighted_T, weight_T = loss_T * batch.weight_T, batch.weight_T
        groups = [batch.targets_of(group) for group in range(len(batch.groups))]
        return torch.stack([weighted_T[own].sum() / weight_T[own].sum().clamp(min=1e-9) for own in groups]).mean()

    def _log_sum(self, batch: ModelBatch, group: int, q_QD: Tensor, v_UD: Tensor) -> Tensor:
        """Log of a group's sum over its candidates, for each of its queries."""
        q_QD, (log_pi_GK, line_Q) = q_QD[batch.queries_of(group)], self._log_pi(batch, group)
        log_sum_Q = log_sum(q_QD, v_UD, batch.candidates_of(group), log_pi_GK, window_Q=line_Q, method=self.method)
        if self.items is None:
            return log_sum_Q
        ids_K = self._counted.pop(batch.groups[group].index, None)
        if ids_K is None:
            ids_K = self._frozen_candidates(batch, group)
        return torch.logaddexp(log_sum_Q, self.items.log_sum(q_QD, ids_K, self.log_pi_V[ids_K]))

    def _log_pi(self, batch: ModelBatch, group: int) -> tuple[Tensor, Tensor]:
        """Lines of log pi of a group's own candidates, and the line of each of its queries: that of its window."""
        log_pi_K = self.log_pi_V[batch.items_U[batch.candidates_of(group)]]
        candidate_T, window_T = batch.candidate_T[batch.targets_of(group)], batch.window_T(group)
        return own_window_certain(log_pi_K, window_T, candidate_T, batch.groups[group].windows), batch.window_Q(group)

    def _frozen_candidates(self, batch: ModelBatch, group: int) -> Tensor:
        """Ascending ids of what is drawn from the frozen catalogue beside the group's targets."""
        ids_K = torch.from_numpy(self._draw(batch.groups[group].index)).to(batch.items_U.device)
        targets_K = batch.items_U[batch.candidates_of(group)]
        return ids_K[~torch.isin(ids_K, targets_K, assume_unique=True)]

    def _draw(self, group_index: int) -> NDArray[np.int64]:
        """Ascending item ids: a pure function of the seed and the group's index."""
        return self.proposal.draw(group_rng(self.seed, group_index))


def own_window_certain(log_pi_K: Tensor, window_T: Tensor, candidate_T: Tensor, num_windows: int) -> Tensor:
    """log pi of the candidates for the queries of each window, log_pi_GK: 0 for the targets of the window itself.

    Given what a query's window holds, the other windows of its group are drawn without regard to it. So the candidates
    that are targets of its own window (candidate_T says which) are there with certainty, and any other item with the
    chance log_pi_K that another window brings it. Then E[1{in} / pi] = 1 for every item, those of the query's
    own history included, and the sum over the candidates is an unbiased estimate of the sum over the catalogue.
    """
    log_pi_GK = log_pi_K.repeat(num_windows, 1)
    log_pi_GK[window_T, candidate_T] = 0.0
    return log_pi_GK
