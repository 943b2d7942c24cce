"""Inputs of the log sum that every implementation must get right, and how far it is from float64.

Q = queries, K = candidates, R = rows of the table, D = width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfm.objective.softmax import log_sum

NAMES = (
    "plain",
    "every item",
    "some absent",
    "all absent",
    "one candidate",
    "one query",
    "no queries",
    "no candidates",
    "likely candidate",
    "rare candidates",
    "high scale",
    "rising scores",
    "low scores",
)


@dataclass(frozen=True)
class Case:
    """The arguments of log_sum, float64, and the weight of each query in the scalar that is differentiated."""

    q_QD: Tensor
    table_RD: Tensor
    ids_K: Tensor
    log_pi_K: Tensor
    weight_Q: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same case with its floats rounded to `dtype` (all but the table at least float32)."""
        wide = torch.promote_types(dtype, torch.float32)
        return Case(
            self.q_QD.to(device, wide),
            self.table_RD.to(device, dtype),
            self.ids_K.to(device),
            self.log_pi_K.to(device, wide),
            self.weight_Q.to(device, wide),
        )


def make_case(name: str, num_queries: int = 37, num_candidates: int = 1003, width: int = 16, seed: int = 0) -> Case:
    """A case of the given name; sizes are its upper bounds and no multiple of any tile."""
    assert name in NAMES, name
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    num_queries = {"one query": 1, "no queries": 0}.get(name, num_queries)
    num_candidates = {"one candidate": 1, "no candidates": 0}.get(name, num_candidates)
    num_table = num_candidates if name == "every item" else num_candidates + num_candidates // 2 + 10
    h_QD = unit(num_queries, width, generator)
    table_RD = unit(num_table, width, generator)
    scale = 20.0
    ids_K = np.sort(rng.choice(num_table, num_candidates, replace=False))
    if name == "likely candidate":
        h_QD = torch.nn.functional.normalize(table_RD[rng.choice(ids_K, num_queries)] + 0.3 * h_QD, dim=-1)
    if name in ("high scale", "rising scores", "low scores"):
        # Multiples of 1/8: float32 has these scores exactly, so that only what follows them is judged.
        h_QD, table_RD = (torch.round(8 * x_ND) / 8 for x_ND in (h_QD, table_RD))
        scale = 128.0
    if name == "rising scores":
        # Up to several hundred, the highest last.
        table_RD = table_RD[(h_QD[:1] @ table_RD.T)[0].argsort()]
        table_RD[-400:] *= 4
    if name == "low scores":
        h_QD[:, 0], table_RD[:, 0] = -1.0, 1.0
    log_pi_K = -rng.uniform(10, 20, num_candidates) if name == "rare candidates" else -rng.uniform(0, 3, num_candidates)
    if name == "every item":
        log_pi_K[:] = 0.0
    if name == "some absent":
        # Whole tiles of them, and scattered ones.
        log_pi_K[: num_candidates // 4], log_pi_K[::3] = np.inf, np.inf
    if name == "all absent":
        log_pi_K[:] = np.inf
    return Case(
        scale * h_QD,
        table_RD,
        torch.from_numpy(ids_K),
        torch.from_numpy(log_pi_K),
        torch.rand(num_queries, generator=generator, dtype=torch.float64) + 0.5,
    )


def unit(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Random directions, float64."""
    return torch.nn.functional.normalize(torch.randn(num, width, generator=generator, dtype=torch.float64), dim=-1)


def results(case: Case, compute: Callable[..., Tensor], live_table: bool = False) -> dict[str, Tensor]:
    """log_sum_Q and the gradients of its weighted sum, by name; the table's only where it is live.

    `compute` takes the arguments of log_sum.
    """
    leaves = {"q": case.q_QD} | ({"table": case.table_RD} if live_table else {})
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    log_sum_Q = compute(leaves["q"], leaves.get("table", case.table_RD), case.ids_K, case.log_pi_K)
    gradients = torch.autograd.grad((log_sum_Q * case.weight_Q).sum(), list(leaves.values()))
    return {"log sum": log_sum_Q.detach(), **dict(zip(leaves, gradients, strict=True))}


def errors(case: Case, compute: Callable[..., Tensor], live_table: bool = False) -> dict[str, float]:
    """Relative error, norm over norm, of every entry of `results` against the dense float64 reference."""

    def reference(*arguments: Tensor) -> Tensor:
        return log_sum(*arguments, method="reference")

    got = results(case, compute, live_table)
    exact = results(case.to(torch.float64, case.q_QD.device.type), reference, live_table)
    return {name: relative_error(got[name], exact[name]) for name in exact}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, 0 where they are equal, also in infinities; any other infinity and NaN show."""
    assert got.shape == exact.shape
    got, exact = got.double(), exact.double()
    differs = got != exact
    if not differs.any():
        return 0.0
    return float((got - exact)[differs].norm() / exact[exact.isfinite()].norm())
