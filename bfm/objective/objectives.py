"""What a training step minimises: the mean over its negative groups of each group's mean loss over its target rows.

Enters: the two-part model and a batch of whole groups. Leaves: one scalar. A group's candidates and its loss depend
on that group alone, so the value and the gradient do not depend on how groups are split into micro-batches or workers
(each of which holds equally many groups).

Stage 1 (`LiveObjective`): both parts are trained, the negatives are the group's distinct targets and, on request,
items drawn for the group, all embedded with it.
Stage 2 (`DrawnObjective`): item vectors are rows of the frozen catalogue, K negatives are drawn per group.

U = distinct items of the batch's groups, T = target rows, V = catalogue items, I = all items, K = candidates of a
group, G = windows of a group or one for all, P = target rows of one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfm.errors import UserError
from bfm.model.batch import NO_ITEMS, ModelBatch
from bfm.model.mixture import Queries, mixture_loss
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
        """Summed loss, number and summed gates of basket rows and of headline rows, [2, 2 + X + 1].

        Headline rows have a target of a later timestamp, as the headline queries of evaluation do.
        """
        headline_T = batch.later_RL.flatten().index_select(0, batch.target_position_T).to(self.loss_T.dtype)
        kind_2T = torch.stack([1.0 - headline_T, headline_T])
        one_T1 = torch.ones_like(headline_T)[:, None]
        return kind_2T @ torch.cat([self.loss_T[:, None], one_T1, self.log_gate_TX1.exp()], 1)


class TwoParts(Protocol):
    """What an objective needs of the model."""

    scale: Tensor
    embed_items: Callable[[Tensor], Tensor]
    contextualize: Callable[[ModelBatch, Tensor], Queries]


class LiveObjective:
    """Stage 1: a row's negatives are the other candidates of its group, corrected by their chance to be there."""

    rows: Rows
    """Of the last batch."""

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
        device;
        `method` is of sampled_softmax.
        Raises UserError where `negatives` is above V.
        """
        _check_catalogue(len(log_pi_batch_V))
        self.log_pi_V, self.seed, self.method = log_pi_batch_V, seed, method
        self.proposal: Proposal | None = None
        if negatives:
            pi_drawn_V = drawn_inclusion(popularity_V, negatives, exponent)
            self.proposal = Proposal.of(pi_drawn_V)
            pi_V = mix_inclusion(np.exp(log_pi_batch_V.double().cpu().numpy()), pi_drawn_V)
            self.log_pi_V = torch.from_numpy(np.log(pi_V)).float().to(log_pi_batch_V.device)

    def drawn(self, group_index: int) -> NDArray[np.int64]:
        """Item ids that are embedded with a group as further candidates."""
        return NO_ITEMS if self.proposal is None else self.proposal.draw(group_rng(self.seed, group_index))

    def __call__(self, model: TwoParts, batch: ModelBatch) -> Tensor:
        """The mean over the batch's groups of the group's weighted mean loss; one without targets counts as zero."""
        v_UD = model.embed_items(batch.items_U)
        queries = model.contextualize(batch, v_UD)
        losses = []
        for group, rows in _groups(batch):
            chosen_K = batch.candidates_C[batch.candidate_offset[group] : batch.candidate_offset[group + 1]]
            window_T, hit_T = batch.window_T(group), batch.hit_T[rows]
            losses.append(
                sampled_softmax(
                    queries.h_TD[rows],
                    v_UD[batch.target_index_T[rows]],
                    v_UD,
                    chosen_K,
                    own_window_certain(self.log_pi_V[batch.items_U[chosen_K]], window_T, hit_T, batch.windows[group]),
                    hit_T,
                    model.scale,
                    window_T=window_T,
                    method=self.method,
                )
            )
        loss, self.rows = _mean_of_groups(batch, queries, losses)
        return loss

    def candidates(self, batch: ModelBatch) -> list[int]:
        """Candidates of each group: its distinct targets and what was drawn."""
        return list(batch.candidates)

    def evaluation_candidates(self, seed: int) -> Candidates:
        """A fixed sample of what training draws: items by the same inclusion probabilities, one draw of `seed`."""
        return fixed_candidates(np.exp(self.log_pi_V.double().cpu().numpy()), seed)


class DrawnObjective:
    """Stage 2: K negatives drawn from the frozen catalogue per group, on request together with the group's targets."""

    rows: Rows
    """Of the last batch."""

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

        `items` holds the constant vectors of all items, whose first V are the candidates; log_pi_batch_V is used only
        where `in_batch` adds the group's targets. Raises UserError where `negatives` is not in 1..V (0 is allowed
        beside `in_batch`).
        """
        _check_catalogue(len(popularity_V))
        self.items, self.seed, self.in_batch, self.negatives = items, seed, in_batch, negatives
        if negatives == 0 and in_batch:
            pi_drawn_V = np.zeros(len(popularity_V))
        else:
            pi_drawn_V = drawn_inclusion(popularity_V, negatives, exponent)
        self.proposal, self.pi_V = Proposal.of(pi_drawn_V), pi_drawn_V
        if in_batch:
            self.pi_V = mix_inclusion(np.exp(log_pi_batch_V.double().cpu().numpy()), pi_drawn_V)
        self.log_pi_V = torch.from_numpy(np.log(self.pi_V)).float().to(items.device)

    def __call__(self, model: TwoParts, batch: ModelBatch) -> Tensor:
        """The mean over the batch's groups of the group's weighted mean loss; one without targets counts as zero."""
        queries = model.contextualize(batch, self.items.vectors(batch.items_U))
        losses = []
        for group, rows in _groups(batch):
            ids_K = self._candidate_ids(batch, group)
            target_T = batch.target_item_T[rows]
            place_T = torch.searchsorted(ids_K, target_T).clamp(max=len(ids_K) - 1)
            hit_T = torch.where(ids_K[place_T] == target_T, place_T, -1)
            log_pi_GK, lengths = self.log_pi_V[ids_K][None], [len(target_T)]
            if self.in_batch:
                # pi differs by window, and every method takes rows of one pi: window by window.
                window_T, num_windows = batch.window_T(group), batch.windows[group]
                log_pi_GK = own_window_certain(log_pi_GK[0], window_T, hit_T, num_windows)
                lengths = torch.bincount(window_T, minlength=num_windows).tolist()
            parts = (values.split(lengths) for values in (queries.h_TD[rows], target_T, hit_T))
            for log_pi_K, h_PD, target_P, hit_P in zip(log_pi_GK, *parts, strict=True):
                losses.append(self.items.loss(h_PD, target_P, ids_K, log_pi_K, hit_P, model.scale))
        loss, self.rows = _mean_of_groups(batch, queries, losses)
        return loss

    def drawn(self, group_index: int) -> NDArray[np.int64]:
        """Nothing: the candidates of stage 2 are not embedded with the group."""
        return NO_ITEMS

    def candidates(self, batch: ModelBatch) -> list[int]:
        """Candidates of each group: K, or the size of the union with the group's distinct targets."""
        if not self.in_batch:
            return [self.negatives] * batch.num_groups
        return [len(self._candidate_ids(batch, group)) for group in range(batch.num_groups)]

    def evaluation_candidates(self, seed: int) -> Candidates:
        """A fixed sample of what training draws: items by the same inclusion probabilities, one draw of `seed`."""
        return fixed_candidates(self.pi_V, seed)

    def _candidate_ids(self, batch: ModelBatch, group: int) -> Tensor:
        """Ascending item ids; a pure function of the seed, the group's global index and its targets."""
        drawn = self.proposal.draw(group_rng(self.seed, batch.group_indices[group]))
        ids_K = torch.from_numpy(drawn).to(batch.items_U.device)
        if not self.in_batch:
            return ids_K
        targets = batch.candidates_C[batch.candidate_offset[group] : batch.candidate_offset[group + 1]]
        return torch.unique(torch.cat([ids_K, batch.items_U[targets]]))


def _check_catalogue(num_items: int) -> None:
    if num_items < 2:
        raise UserError(
            f"a catalogue of {num_items} item{'s' if num_items != 1 else ''} has no negative for any target",
            key="item",
            fix="train on a log with more items before the split",
        )


def _groups(batch: ModelBatch) -> Iterator[tuple[int, slice]]:
    for group in range(batch.num_groups):
        yield group, slice(batch.row_offset[group], batch.row_offset[group + 1])


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


def _mean_of_groups(batch: ModelBatch, queries: Queries, losses: list[Tensor]) -> tuple[Tensor, Rows]:
    """Mean over groups of the weighted mean over their rows, and these; a group without targets counts as zero."""
    loss_T = mixture_loss(torch.cat(losses), queries.log_gate_TX1, target_mass(batch, queries))
    weighted_T, weight_T = loss_T * batch.weight_T, batch.weight_T
    # The last group of a small log may hold no target, and its mean would be NaN.
    means = [weighted_T[rows].sum() / weight_T[rows].sum().clamp(min=1e-9) for _, rows in _groups(batch)]
    return torch.stack(means).mean(), Rows(loss_T.detach(), queries.log_gate_TX1.detach())


def target_mass(batch: ModelBatch, queries: Queries) -> Tensor:
    """What the sparse components give each row's target, [T, X]."""
    masses = [queries.h_TD.new_zeros(len(queries.h_TD), 0)]
    if queries.pointer_TL is not None:
        item_TL = batch.item_RL.index_select(0, batch.target_position_T // batch.item_RL.shape[1])
        # Pads carry the index of some item, and probability 0.
        masses.append((queries.pointer_TL * (item_TL == batch.target_index_T[:, None])).sum(1, keepdim=True))
    if queries.counted_TM is not None:
        assert batch.share_TM is not None, "windows without what their model was to count"
        masses.append((queries.counted_TM * batch.share_TM).sum(1, keepdim=True))
    return torch.cat(masses, 1)
