"""The tiers of a search space: how tasks are run, as the file says it, checked.

Enters: the keys of `scaling.tiers`. Leaves: Tiers, one per number of workers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bfm.errors import UserError
from bfm.objective.methods import Method, check_method
from bfm.sweep.keys import Count, Counts, Number, Section, at_least
from bfm.sweep.settings import SweepSpec, Tier
from bfm.units import format_flops


class TierKeys(Section):
    """See bfm.sweep.settings.Tier."""

    from_rung_flops: Number = 0.0
    from_params: Number = 0.0
    engine: Literal["plain", "deepspeed"] = "plain"
    workers: Counts = Field(default=[1], description="or a list: as many of these as are free and pay")
    zero_stage: Count = 0
    cpus: Number = 1.0
    gpus: Number = 0.0
    micro_groups: Count = 1
    softmax: Method = "auto"
    memory_gib: Number | None = None


def alternatives(keys: TierKeys, key: str) -> list[Tier]:
    """One tier per number of workers."""
    at_least(keys.micro_groups, 1, f"{key}.micro_groups")
    at_least(min(keys.workers, default=0), 1, f"{key}.workers")
    if len(set(keys.workers)) < len(keys.workers):
        raise UserError("repeats a number of workers", key=f"{key}.workers", fix="write each once, such as [1, 2, 4]")
    if keys.engine == "plain" and (max(keys.workers) > 1 or keys.zero_stage > 0):
        raise UserError("the plain engine has one worker and no ZeRO", key=key, fix="write engine: deepspeed")
    if not 0 <= keys.zero_stage <= 3:
        raise UserError(f"there is no ZeRO stage {keys.zero_stage}", key=f"{key}.zero_stage", fix="write 0, 1, 2 or 3")
    if keys.cpus <= 0:
        raise UserError("a worker needs a part of a CPU", key=f"{key}.cpus", fix="write a number above 0, such as 0.5")
    if keys.gpus < 0 or (keys.gpus > 1 and keys.gpus != int(keys.gpus)):
        raise UserError(
            f"{keys.gpus:g} GPUs cannot be given", key=f"{key}.gpus", fix="write 0, a fraction or a whole number"
        )
    if keys.memory_gib is not None and keys.memory_gib <= 0:
        raise UserError("must be above 0", key=f"{key}.memory_gib", fix="write GiB per worker, or leave it out")
    return [Tier(**{**keys.model_dump(), "workers": workers}) for workers in keys.workers]


def check_tiers(spec: SweepSpec, tiers: list[TierKeys]) -> None:
    """Raises UserError where small tasks have no tier, no task reaches one, or one cannot do what the space asks."""
    if not tiers or tiers[0].from_rung_flops > 0 or tiers[0].from_params > 0:
        raise UserError(
            "small tasks have no tier", key="scaling.tiers", fix="let the first tier have no from_ thresholds"
        )
    top = spec.budget.ladder_flops[-1]
    freezes = spec.stage1 is not None or any(
        p.name == "freeze_at_flops" and None not in p.values for p in spec.parameters
    )
    for index, tier in enumerate(tiers):
        key = f"scaling.tiers.{index}"
        for workers in tier.workers:
            check_method(tier.softmax, freezes=freezes, workers=workers, cuda=tier.gpus > 0, key=f"{key}.softmax")
        if max(tier.workers) > 1 and 0 < tier.gpus < 1:
            raise UserError(
                f"{max(tier.workers)} workers cannot share GPUs (NCCL takes one process on each)",
                key=f"{key}.gpus",
                fix="write a whole number of GPUs per worker, or workers: 1",
            )
        if tier.from_rung_flops > top:
            raise UserError(
                f"no rung reaches it (the top is {format_flops(top)})",
                key=f"{key}.from_rung_flops",
                fix="lower it, or leave the tier out",
            )
