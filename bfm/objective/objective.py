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

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import UserError
from bfm.events.windows import Windows
from bfm.model.batch import NO_ITEMS, ModelBatch, make_batch
from bfm.model.blocks import look_up
from bfm.model.mixture import mixture_loss, target_mass
from bfm.model.two_part import TwoPartModel
from bfm.objective.frozen import FrozenItems
from bfm.objective.sampling import Proposal, drawn_inclusion, group_rng, mix_inclusion
from bfm.objective.softmax import log_sum
from bfm.objective.tiled import as_multiplied


class Objective:
    """What is drawn for groups, and the mean loss of a batch of them."""

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
        model's device; items: the vectors of stage 2, None in stage 1; method: of `log_sum` over the live candidates.
        Raises UserError where `negatives` is above V, or V below 2.
        """
        num_items = len(log_pi_batch_V)
        if num_items < 2:
            raise UserError(
                f"a catalogue of {num_items} item{'s' if num_items != 1 else ''} has no negative for any target",
                key="item",
                fix="train on a log with more items before the split",
            )
        self.seed, self.items, self.method, self.draws = seed, items, method, negatives > 0
        drawn_pi_V = drawn_inclusion(popularity_V, negatives, exponent) if negatives else np.zeros(num_items)
        self.proposal = Proposal.of(drawn_pi_V)
        self.pi_V = mix_inclusion(log_pi_batch_V.double().exp().cpu().numpy(), drawn_pi_V)
        self.log_pi_V = torch.from_numpy(self.pi_V).log().to(log_pi_batch_V)

    def batch(self, windows: Windows, indices: Sequence[int]) -> ModelBatch:
        """A batch of whole groups with what is drawn for each, a function of the seed and its index in the order."""
        drawn = [NO_ITEMS] * len(indices)
        if self.draws:
            drawn = [self.proposal.draw(group_rng(self.seed, index)) for index in indices]
        if self.items is None:
            return make_batch(windows, indices, drawn).to(self.log_pi_V.device)
        batch = make_batch(windows, indices)
        beside = []
        for group, ids in enumerate(drawn):
            ids_K, targets_K = torch.from_numpy(ids), batch.items_U[batch.candidates_of(group)]
            beside.append(ids_K[~torch.isin(ids_K, targets_K, assume_unique=True)])
        return dataclasses.replace(batch, frozen=tuple(beside)).to(self.log_pi_V.device)

    def __call__(self, model: TwoPartModel, batch: ModelBatch) -> tuple[Tensor, Tensor]:
        """Loss of what `batch` has made, and the sums of its targets (`_sums`).

        The loss is the mean over groups of the weighted mean over their targets; one without targets counts as zero.
        """
        v_UD = as_multiplied(
            model.embed_items(batch.items_U) if self.items is None else self.items.vectors(batch.items_U)
        )
        queries = model.contextualize(batch, v_UD)
        q_QD = as_multiplied(model.scale * queries.h_QD)
        log_sum_Q = self._log_sum(batch, q_QD, v_UD)
        score_T = (look_up(q_QD, batch.query_T) * look_up(v_UD, batch.target_index_T)).sum(-1)
        softmax_T = look_up(log_sum_Q, batch.query_T) - score_T
        loss_T = mixture_loss(softmax_T, queries.log_gate_TX1, target_mass(batch, queries))
        return (loss_T * batch.share_T).sum(), _sums(batch, loss_T.detach(), queries.log_gate_TX1.detach())

    def _log_sum(self, batch: ModelBatch, q_QD: Tensor, v_UD: Tensor) -> Tensor:
        """Log of the sum over the candidates of its group, for each query."""
        sums, first_item = [], 0
        queries, items = ([getattr(counts, what) for counts in batch.groups] for what in ("queries", "items"))
        # Split, not sliced: the gradient of a slice is as large as the whole.
        for group, (own_QD, own_UD) in enumerate(zip(q_QD.split(queries), v_UD.split(items), strict=True)):
            ids_K, (log_pi_GK, line_Q) = batch.candidates_of(group) - first_item, self._log_pi(batch, group)
            sums.append(log_sum(own_QD, own_UD, ids_K, log_pi_GK, window_Q=line_Q, method=self.method))
            first_item += items[group]
            if self.items is not None:
                ids_K = batch.frozen[group]
                sums[-1] = torch.logaddexp(sums[-1], self.items.log_sum(own_QD, ids_K, self.log_pi_V[ids_K]))
        return torch.cat(sums)

    def _log_pi(self, batch: ModelBatch, group: int) -> tuple[Tensor, Tensor]:
        """Lines of log pi of a group's own candidates, and the line of each of its queries: that of its window."""
        log_pi_K = self.log_pi_V[batch.items_U[batch.candidates_of(group)]]
        candidate_T, window_T = batch.candidate_T[batch.targets_of(group)], batch.window_T(group)
        return own_window_certain(log_pi_K, window_T, candidate_T, batch.groups[group].windows), batch.window_Q(group)


def _sums(batch: ModelBatch, loss_T: Tensor, log_gate_TX1: Tensor) -> Tensor:
    """Weighted sums of loss, one and gates over basket and over headline targets, [2, 2 + X + 1].

    Headline targets have a later timestamp than their query, as those of headline queries in evaluation.
    """
    headline_T = batch.places.take(batch.later_RL)[batch.query_T].to(loss_T.dtype)
    kind_2T = torch.stack([1.0 - headline_T, headline_T]) * batch.weight_T
    told_T = torch.cat([loss_T[:, None], torch.ones_like(headline_T)[:, None], log_gate_TX1.exp()], 1)
    # They are shown: half precision would round them.
    with torch.autocast(loss_T.device.type, enabled=False):
        return kind_2T @ told_T


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
