"""Inputs of the sampled softmax that every implementation must get right, and how far it is from float64.

T = target rows, K = candidates, R = rows of the table, D = width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfm.objective.softmax import sampled_softmax

NAMES = (
    "plain",
    "hits",
    "every item",
    "all hit",
    "one row",
    "no rows",
    "no candidates",
    "likely target",
    "rare candidates",
    "high scale",
    "rising scores",
    "low scores",
)


@dataclass(frozen=True)
class Case:
    """The arguments of sampled_softmax, float64 and the weight of each row in the scalar that is differentiated."""

    h_TD: Tensor
    positive_TD: Tensor
    table_RD: Tensor
    ids_K: Tensor
    log_pi_K: Tensor
    hit_T: Tensor
    scale: Tensor
    weight_T: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same case with its floats rounded to `dtype` (log_pi at least float32)."""
        wide = torch.promote_types(dtype, torch.float32)
        return Case(
            self.h_TD.to(device, dtype),
            self.positive_TD.to(device, dtype),
            self.table_RD.to(device, dtype),
            self.ids_K.to(device),
            self.log_pi_K.to(device, wide),
            self.hit_T.to(device),
            self.scale.to(device, wide),
            self.weight_T.to(device, wide),
        )


def make_case(name: str, num_rows: int = 37, num_candidates: int = 1003, width: int = 16, seed: int = 0) -> Case:
    """A case of the given name; sizes are its upper bounds and no multiple of any tile."""
    assert name in NAMES, name
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    num_rows = {"one row": 1, "no rows": 0}.get(name, num_rows)
    num_candidates = {"all hit": 1, "no candidates": 0}.get(name, num_candidates)
    num_table = num_candidates if name == "every item" else num_candidates + num_candidates // 2 + 10
    h_TD = unit(num_rows, width, generator)
    table_RD = unit(num_table, width, generator)
    scale = 20.0
    ids_K = np.sort(rng.choice(num_table, num_candidates, replace=False))
    target_T = rng.integers(0, num_table, num_rows)
    if name in ("hits", "one row", "likely target", "rising scores"):
        target_T = rng.choice(ids_K, num_rows)
    if name == "all hit":
        target_T[:] = ids_K[0]
    if name == "likely target":
        h_TD = torch.nn.functional.normalize(table_RD[target_T] + 0.3 * h_TD, dim=-1)
    if name in ("high scale", "rising scores", "low scores"):
        # Multiples of 1/8: float32 has these scores exactly, so that only what follows them is judged.
        h_TD, table_RD = (torch.round(8 * x_ND) / 8 for x_ND in (h_TD, table_RD))
        scale = 128.0
    if name == "rising scores":
        # Up to several hundred, the highest last.
        table_RD = table_RD[(h_TD[:1] @ table_RD.T)[0].argsort()]
        table_RD[-400:] *= 4
    if name == "low scores":
        h_TD[:, 0], table_RD[:, 0] = -1.0, 1.0
    log_pi_K = -rng.uniform(10, 20, num_candidates) if name == "rare candidates" else -rng.uniform(0, 3, num_candidates)
    if name == "every item":
        log_pi_K[:] = 0.0
    place_T = np.minimum(np.searchsorted(ids_K, target_T), max(0, num_candidates - 1))
    found_T = ids_K[place_T] == target_T if num_candidates else np.zeros(num_rows, dtype=bool)
    return Case(
        h_TD,
        table_RD[target_T].clone(),
        table_RD,
        torch.from_numpy(ids_K),
        torch.from_numpy(log_pi_K),
        torch.from_numpy(np.where(found_T, place_T, -1)),
        torch.tensor(scale, dtype=torch.float64),
        torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.5,
    )


def unit(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Random directions, float64."""
    return torch.nn.functional.normalize(torch.randn(num, width, generator=generator, dtype=torch.float64), dim=-1)


def results(case: Case, loss: Callable[..., Tensor], live_table: bool = False) -> dict[str, Tensor]:
    """loss_T and the gradients of its weighted sum, by name; the table's only where it is live.

    `loss` takes the arguments of sampled_softmax.
    """
    leaves = {"h": case.h_TD, "positive": case.positive_TD, "scale": case.scale}
    if live_table:
        leaves["table"] = case.table_RD
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    loss_T = loss(
        leaves["h"],
        leaves["positive"],
        leaves.get("table", case.table_RD),
        case.ids_K,
        case.log_pi_K,
        case.hit_T,
        leaves["scale"],
    )
    gradients = torch.autograd.grad((loss_T * case.weight_T).sum(), list(leaves.values()))
    return {"loss": loss_T.detach(), **dict(zip(leaves, gradients, strict=True))}


def errors(case: Case, loss: Callable[..., Tensor], live_table: bool = False) -> dict[str, float]:
    """Relative error, norm over norm, of every entry of `results` against the dense float64 reference."""

    def reference(*arguments: Tensor) -> Tensor:
        return sampled_softmax(*arguments, method="reference")

    got = results(case, loss, live_table)
    exact = results(case.to(torch.float64, case.h_TD.device.type), reference, live_table)
    return {name: relative_error(got[name], exact[name]) for name in exact}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, 0 where both are 0; NaN and infinity show."""
    distance = (got.double() - exact.double()).norm()
    return 0.0 if distance == 0 else float(distance / exact.double().norm())
