"""The output distribution: a softmax over the catalogue, mixed with sparse distributions over few items.

    p(v) = g_0 softmax(scale <h, v>) + sum_x g_x c_x(v),     g = softmax of the gates of a position

One vector cannot put mass on several unrelated items of a user's past (arXiv 2310.14079); a sparse component can, at a
cost that does not grow with the catalogue. There are two, both attention over the user's own events in the window:

    pointer     an event stands for its item (Vinyals et al. 2015, See et al. 2017)
    neighbours  each of the last M events stands for the counted neighbours of its item (bfm/events/neighbours.py):
                rare transitions, which a factorised score forgets, as n-gram models interpolate them. Trained together,
                the network learns what counts do not know; its targets' own events must be left out of the counts.
                With a share that is given, the network is trained alone and mixed where it is asked: where it knows
                training events by heart, a gate learned on these leaves the counts too little.

Enters: what the contextualizer knows at every position. Leaves: gates and probabilities. All but the neighbours of a
target, whose own event their counts leave out, is the same for the targets of one query.

R windows, L positions, W width of the contextualizer, P width of the pointer's keys, Q queries, T targets, S slots of
a window's queries, A pairs of a query and an event that it attends to, M last events, X sparse components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfm.model.attended import STEPS, Pairs, half_octave
from bfm.model.batch import ModelBatch, QueryPlaces
from bfm.model.blocks import look_up, make_linear, rms_norm

_AGE_DECAY = 0.8
"""Of counted events, per event: between what the two ways of counting do well with."""


@dataclass(frozen=True)
class Queries:
    """What the model says at the queries of a batch and, where the counts leave its event out, for each target."""

    h_QD: Tensor
    """Unit vectors, float32: the softmax over the catalogue."""
    log_gate_TX1: Tensor
    """log g, float32: the softmax first, then the sparse components (X = 0: all zero)."""
    pointer_A: Tensor | None
    """Probabilities of the events that a query attends to (`QueryPlaces.pairs`), float32; None without a pointer."""
    counted_TM: Tensor | None = None
    """Probabilities of the last events that have neighbours, float32; None without neighbours."""


def mixture_loss(loss_T: Tensor, log_gate_TX1: Tensor, mass_TX: Tensor) -> Tensor:
    """-log p of the targets, [T]: loss_T of the softmax alone, mass_TX what each sparse component gives the target."""
    if mass_TX.shape[1] == 0:
        return loss_T
    # Where a component gives nothing it must leave neither a value nor a NaN in the gradient.
    nothing_TX = mass_TX <= 0
    log_mass_TX = torch.where(nothing_TX, 1.0, mass_TX).log().masked_fill(nothing_TX, -torch.inf)
    return -torch.logsumexp(log_gate_TX1 + torch.cat([-loss_T[:, None], log_mass_TX], 1), 1)


def target_mass(batch: ModelBatch, queries: Queries) -> Tensor:
    """What the sparse components give each target, [T, X]."""
    masses = [queries.h_QD.new_zeros(len(batch.query_T), 0)]
    if queries.pointer_A is not None:
        copied_N = look_up(queries.pointer_A, batch.copy_N)
        masses.append(torch.segment_reduce(copied_N, "sum", lengths=batch.copies_T, unsafe=True)[:, None])
    if queries.counted_TM is not None:
        assert batch.share_TM is not None, "windows without what their model was to count"
        masses.append((queries.counted_TM * batch.share_TM).sum(1, keepdim=True))
    return torch.cat(masses, 1)


class Pointer(nn.Module):
    """Attention over the user's own events, and its gate.

    The score of an event is <q, k>, a learned value of its distance in events, and one of the time that has passed.
    """

    def __init__(self, width: int, key_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.query = make_linear(width, key_width, generator)
        # Zero: a new pointer gives all events of a history the same weight.
        self.key = make_linear(width, key_width, None)
        self.gate = make_linear(width, 1, None)
        self.gate_bias = nn.Parameter(torch.zeros(1))
        self.distance_bias = nn.Parameter(torch.zeros(STEPS))
        self.elapsed_bias = nn.Parameter(torch.zeros(STEPS))

    def forward(self, x_RLW: Tensor, x_QW: Tensor, batch: ModelBatch) -> tuple[Tensor, Tensor]:
        """Gate logits [Q, 1] and probabilities of the pairs of all queries [A], float32; both x are normalised."""
        pairs, k_RLP = batch.places.pairs, self.key(x_RLW)
        q_QP = rms_norm(self.query(x_QW)) * k_RLP.shape[2] ** -0.5
        score_A = _products(q_QP, k_RLP, batch.places, pairs).float()
        time_N = batch.time_RL.flatten()
        elapsed_A = batch.places.take(batch.time_RL)[pairs.query_A] - time_N[pairs.position_A]
        bias = (self.distance_bias[:, None] + self.elapsed_bias).flatten()
        score_A = score_A + look_up(bias, half_octave(pairs.distance_A) * STEPS + half_octave(elapsed_A))
        return self.gate(x_QW).float() + self.gate_bias, pairs.softmax(score_A)


def takes_pairs(places: QueryPlaces, rows: int, length: int, width: int) -> bool:
    """Whether the vectors of all pairs are fewer numbers than the products of all slots and positions.

    So it is where windows hold many users.
    """
    return places.num_pairs * width < rows * places.slots * length


def _products(q_QP: Tensor, k_RLP: Tensor, places: QueryPlaces, pairs: Pairs) -> Tensor:
    """<q, k> of every pair, [A]."""
    rows, length, width = k_RLP.shape
    if takes_pairs(places, rows, length, width):
        return (look_up(q_QP, pairs.query_A) * look_up(k_RLP.flatten(0, 1), pairs.position_A)).sum(-1)
    product_RSL = places.spread(q_QP, rows) @ k_RLP.mT
    line_Q = length * (places.slot_Q - places.window_Q)
    return look_up(product_RSL.flatten(), line_Q.index_select(0, pairs.query_A) + pairs.position_A)


def mix_counts(log_gate_TX: Tensor, counted_TM: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log g [T, X + 1] with a given share for counted neighbours, and the probabilities of the events they are of."""
    known_TM = counted_TM >= 0
    share_T1 = known_TM.any(1, keepdim=True) * share
    age_M = torch.arange(known_TM.shape[1], device=counted_TM.device)
    weight_TM = known_TM * _AGE_DECAY**age_M
    weight_TM = weight_TM / weight_TM.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([log_gate_TX + torch.log1p(-share_T1), share_T1.log()], 1), weight_TM


class NeighbourAttention(nn.Module):
    """Attention over the last M events that have counted neighbours, and its gate.

    The score of an event is a linear map of what is known at it, and a learned value of its age.
    """

    def __init__(self, width: int, num_events: int) -> None:
        super().__init__()
        self.key = make_linear(width, 1, None)
        self.gate = make_linear(width, 1, None)
        self.gate_bias = nn.Parameter(torch.zeros(1))
        self.age_bias = nn.Parameter(torch.arange(num_events) * math.log(_AGE_DECAY))

    def forward(self, x_RLW: Tensor, x_QW: Tensor, batch: ModelBatch) -> tuple[Tensor, Tensor]:
        """Gate logits [T, 1] and probabilities [T, M], float32. A target none of whose items is known has gate 0."""
        assert batch.counted_TM is not None, "windows without what their model was to count"
        known_TM, position_T = batch.counted_TM >= 0, batch.places.position_Q.index_select(0, batch.query_T)
        age_M = torch.arange(known_TM.shape[1], device=x_RLW.device)
        # A known event lies inside the window; any place does for the others.
        place_TM = (position_T[:, None] - age_M).clamp(min=0)
        score_TM = look_up(self.key(x_RLW).flatten().float(), place_TM) + self.age_bias
        weight_TM = F.softmax(score_TM.masked_fill(~known_TM, torch.finfo(torch.float32).min), -1)
        gate_T1 = look_up(self.gate(x_QW).float() + self.gate_bias, batch.query_T)
        return gate_T1.masked_fill(~known_TM.any(1, keepdim=True), -torch.inf), weight_TM * known_TM
