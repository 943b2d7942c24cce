"""What a training step minimises: the mean over its negative groups of each group's mean loss over its target rows.

Enters: the two-part model and a batch of whole groups. Leaves: one scalar. A group's candidates and its loss depend
on that group alone, so the value and the gradient do not depend on how groups are split into micro-batches or workers
(each of which holds equally many groups).

Stage 1 (`LiveObjective`): both parts are trained, the negatives are the group's distinct targets and, on request,
items drawn for the group, all embedded with it.
Stage 2 (`DrawnObjective`): item vectors are rows of the frozen catalogue, K negatives are drawn per group, on request
together with the group's distinct targets.

U = distinct items of the batch's groups, T = target rows, V = catalogue items, K = candidates of a group, G = windows
of a group or one for all, P = target rows of one of these.
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
from bfm.model.mixture import Queries, mixture_loss, target_mass
from bfm.model.two_part import TwoPartModel
from bfm.objective.frozen import FrozenItems
from bfm.objective.sampling import (
    Candidates,
    Proposal,
    drawn_inclusion,
    fixed_candidates,
    group_rng,
    mix_inclusion,
)
from bfm.objective.softmax import sampled_softmax


@dataclass(frozen=True)
class Rows:
    """Loss and gates of a batch's target rows, without a gradient."""

    loss_T: Tensor
    log_gate_TX1: Tensor

    def sums(self, batch: ModelBatch) -> Tensor:
        """Weighted sums of loss, one and gates over basket rows and over headline rows, [2, 2 + X + 1].

        Headline rows have a target of a later timestamp, as the headline queries of evaluation do.
        """
        headline_T = batch.later_RL.flatten().index_select(0, batch.target_position_T).to(self.loss_T.dtype)
        kind_2T = torch.stack([1.0 - headline_T, headline_T]) * batch.weight_T
        one_T1 = torch.ones_like(headline_T)[:, None]
        return kind_2T @ torch.cat([self.loss_T[:, None], one_T1, self.log_gate_TX1.exp()], 1)


class _Objective:
    """The candidates of a group, drawn for it, with its own targets or without; the mean of the groups' losses."""

    rows: Rows
    """Of the last batch."""

    def __init__(
        self,
        popularity_V: NDArray[np.integer],
        negatives: int,
        exponent: float,
        in_batch: bool,
        log_pi_batch_V: Tensor,
        seed: int,
    ) -> None:
        num_items = len(log_pi_batch_V)
        if num_items < 2:
            raise UserError(
                f"a catalogue of {num_items} item{'s' if num_items != 1 else ''} has no negative for any target",
                key="item",
                fix="train on a log with more items before the split",
            )
        self.in_batch, self.seed = in_batch, seed
        only_targets = in_batch and negatives == 0
        self.pi_V = np.zeros(num_items) if only_targets else drawn_inclusion(popularity_V, negatives, exponent)
        self.proposal = Proposal.of(self.pi_V)
        if in_batch:
            self.pi_V = mix_inclusion(log_pi_batch_V.double().exp().cpu().numpy(), self.pi_V)
        self.log_pi_V = torch.from_numpy(self.pi_V).log().to(log_pi_batch_V)

    def evaluation_candidates(self, seed: int) -> Candidates:
        """A fixed sample of what training draws: items by the same inclusion probabilities, one draw of `seed`."""
        return fixed_candidates(self.pi_V, seed)

    def _mean_of_groups(self, batch: ModelBatch, queries: Queries, losses: list[Tensor]) -> Tensor:
        """Mean over groups of the weighted mean over their rows, which are kept; one without targets counts as zero."""
        loss_T = mixture_loss(torch.cat(losses), queries.log_gate_TX1, target_mass(batch, queries))
        self.rows = Rows(loss_T.detach(), queries.log_gate_TX1.detach())
        # The last group of a small log may hold no target, and its mean would be NaN.
        weighted_T, weight_T = loss_T * batch.weight_T, batch.weight_T
        groups = [batch.rows_of(group) for group in range(batch.num_groups)]
        return torch.stack([weighted_T[rows].sum() / weight_T[rows].sum().clamp(min=1e-9) for rows in groups]).mean()

    def _draw(self, group_index: int) -> NDArray[np.int64]:
        """Ascending item ids: a pure function of the seed and the group's index."""
        return self.proposal.draw(group_rng(self.seed, group_index))


class LiveObjective(_Objective):
    """Stage 1: a row's negatives are the other candidates of its group, corrected by their chance to be there."""

    def __init__(
        self,
        log_pi_batch_V: Tensor,
        popularity_V: NDArray[np.integer],
        negatives: int,
        exponent: float,
        seed: int,
        method: str = "auto",
    ) -> None:
        """Fix the proposal: the group's distinct targets and `negatives` drawn items, pi ~ popularity^exponent.

        log_pi_batch_V: log of the chance that another window of the group brings each catalogue item, on the model's
        device; `method` is of sampled_softmax.
        Raises UserError where `negatives` is above V, or V below 2.
        """
        super().__init__(popularity_V, negatives, exponent, True, log_pi_batch_V, seed)
        self.method = method

    def drawn(self, group_index: int) -> NDArray[np.int64]:
        """Item ids that are embedded with a group as further candidates."""
        return self._draw(group_index)

    def candidates(self, batch: ModelBatch) -> list[int]:
        """Candidates of each group: its distinct targets and what was drawn."""
        return list(batch.candidates)

    def __call__(self, model: TwoPartModel, batch: ModelBatch) -> Tensor:
        """The mean over the batch's groups of the group's weighted mean loss; one without targets counts as zero."""
        v_UD = model.embed_items(batch.items_U)
        queries = model.contextualize(batch, v_UD)
        losses = []
        for group in range(batch.num_groups):
            rows, place_K, window_T = batch.rows_of(group), batch.candidates_of(group), batch.window_T(group)
            log_pi_K, hit_T = self.log_pi_V[batch.items_U[place_K]], batch.hit_T[rows]
            losses.append(
                sampled_softmax(
                    queries.h_TD[rows],
                    look_up(v_UD, batch.target_index_T[rows]),
                    v_UD,
                    place_K,
                    own_window_certain(log_pi_K, window_T, hit_T, batch.windows[group]),
                    hit_T,
                    model.scale,
                    window_T=window_T,
                    method=self.method,
                )
            )
        return self._mean_of_groups(batch, queries, losses)


class DrawnObjective(_Objective):
    """Stage 2: K negatives drawn from the frozen catalogue per group, on request together with the group's targets."""

    def __init__(
        self,
        items: FrozenItems,
        popularity_V: NDArray[np.integer],
        negatives: int,
        exponent: float,
        in_batch: bool,
        log_pi_batch_V: Tensor,
        seed: int,
    ) -> None:
        """Fix the proposal: pi = min(1, c * popularity^exponent) with sum `negatives`, mixed with the in-batch one.

        `items` holds the constant vectors of all items, whose first V are the candidates; the values of log_pi_batch_V
        are used only where `in_batch` adds the group's targets. Raises UserError where `negatives` is not in 1..V (0 is
        allowed beside `in_batch`), or V below 2.
        """
        super().__init__(popularity_V, negatives, exponent, in_batch, log_pi_batch_V, seed)
        self.items, self.negatives = items, negatives

    def drawn(self, group_index: int) -> NDArray[np.int64]:
        """Nothing: the candidates of stage 2 are not embedded with the group."""
        return NO_ITEMS

    def candidates(self, batch: ModelBatch) -> list[int]:
        """Candidates of each group: K, or the size of the union with the group's distinct targets."""
        if not self.in_batch:
            return [self.negatives] * batch.num_groups
        return [len(self._candidate_ids(batch, group)) for group in range(batch.num_groups)]

    def __call__(self, model: TwoPartModel, batch: ModelBatch) -> Tensor:
        """The mean over the batch's groups of the group's weighted mean loss; one without targets counts as zero."""
        queries = model.contextualize(batch, self.items.vectors(batch.items_U))
        losses = []
        for group in range(batch.num_groups):
            rows, ids_K = batch.rows_of(group), self._candidate_ids(batch, group)
            target_T, log_pi_K = batch.items_U[batch.target_index_T[rows]], self.log_pi_V[ids_K]
            place_T = torch.searchsorted(ids_K, target_T).clamp(max=len(ids_K) - 1)
            hit_T = torch.where(ids_K[place_T] == target_T, place_T, -1)
            log_pi_GK, lengths = log_pi_K[None], [len(target_T)]
            if self.in_batch:
                # pi differs by window, and items take rows of one pi: window by window.
                window_T, num_windows = batch.window_T(group), batch.windows[group]
                log_pi_GK = own_window_certain(log_pi_K, window_T, hit_T, num_windows)
                lengths = torch.bincount(window_T, minlength=num_windows).tolist()
            parts = (values.split(lengths) for values in (queries.h_TD[rows], target_T, hit_T))
            for own_log_pi_K, h_PD, target_P, hit_P in zip(log_pi_GK, *parts, strict=True):
                losses.append(self.items.loss(h_PD, target_P, ids_K, own_log_pi_K, hit_P, model.scale))
        return self._mean_of_groups(batch, queries, losses)

    def _candidate_ids(self, batch: ModelBatch, group: int) -> Tensor:
        """Ascending item ids; a pure function of the seed, the group's global index and its targets."""
        ids_K = torch.from_numpy(self._draw(batch.group_indices[group])).to(batch.items_U.device)
        if not self.in_batch:
            return ids_K
        return torch.unique(torch.cat([ids_K, batch.items_U[batch.candidates_of(group)]]))


def own_window_certain(log_pi_K: Tensor, window_T: Tensor, hit_T: Tensor, num_windows: int) -> Tensor:
    """log pi of the candidates for the rows of each window, log_pi_GK: 0 for the targets of the window itself.

    Given what a row's window holds, the other windows of its group are drawn without regard to it. So the candidates
    that stand in the row's own window are there with certainty (pi = 1), and any other item with the chance log_pi_K
    that another window brings it. Then E[1{in} / pi] = 1 for every item, those of the row's own history included, and
    the sum over the candidates is an unbiased estimate of the sum over the catalogue.
    """
    log_pi_GK = log_pi_K.repeat(num_windows, 1)
    log_pi_GK[window_T, hit_T] = 0.0
    return log_pi_GK
