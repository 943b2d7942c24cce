"""Warmup-stable-decay as pure functions, and which rungs a configuration can be trained to.

In: counters (events seen, path_flops). Out: factors of the learning rate and of decay, step counts, refusals.
The trunk warms up linearly over `warmup_events` and then stays constant, so it does not know how long it will be.
A rung at C branches off the trunk at (1 - f) C and cools down linearly in path_flops to 0 at C
(Hagele et al. 2024, arXiv 2405.18392, with the cooldown measured in the unit that the rung is measured in).
"""

from __future__ import annotations

from bfm.errors import InfeasibleError
from bfm.units import format_flops

MIN_STEPS = 100
"""A rung's row takes at least this many optimizer steps."""
TOLERANCE = 0.01
"""A rung's row has spent its C within this share, or within twice this where one step costs so much."""

RULE_RATE, RULE_PARAMS, RULE_POSITIONS = 6e-3, 5e4, 2048
"""The rule's learning rate, and where it holds."""
RULE_BY_PARAMS, RULE_BY_POSITIONS = -0.1, 0.3
"""Exponents of N and of the positions of a step."""
LARGEST_RATE = 2e-2
"""The rule goes no further: rates above were worse at every corner."""


def rule_learning_rate(params: float, batch_positions: float) -> float:
    """A good peak rate for N = `params` and steps of `batch_positions` (windows times L): a power law in both.

    Fitted to sweeps at five corners, N from 2.5e3 to 2e5, steps of 1,024 to 8,192 positions, D / N from 1,000 to 1, in
    each of which rates on either side of the best one were worse (benchmarks/results/choices_learning_rate.md). It is
    within a factor 1.9 of each best rate, which costs about .01 nats; the exponents are good to about .1. Outside of
    them it is an extrapolation.
    """
    by_params = (params / RULE_PARAMS) ** RULE_BY_PARAMS
    return min(LARGEST_RATE, RULE_RATE * by_params * (batch_positions / RULE_POSITIONS) ** RULE_BY_POSITIONS)


def lr_factor_trunk(events_seen: int, warmup_events: float) -> float:
    """Factor of the peak rate for the step that ends at `events_seen`; in (0, 1]."""
    return 1.0 if events_seen >= warmup_events else events_seen / warmup_events


def lr_factor_cooldown(path_flops: int, branch_from_flops: int, until_flops: float) -> float:
    """Factor for the step that begins at `path_flops` of a branch from `branch_from_flops`: 1 there, 0 at the end."""
    return max(0.0, (until_flops - path_flops) / (until_flops - branch_from_flops))


def repeats(events_seen: int, epoch_events: int) -> float:
    """How often the events so far have been seen before: epochs beyond the first."""
    return max(0.0, events_seen / epoch_events - 1.0)


def trunk_flops(rung_flops: float, cooldown_fraction: float) -> float:
    """Where a rung's trunk ends: (1 - f) C."""
    # Above 2**53 the product of a whole number and 1.0 may exceed it.
    return min((1.0 - cooldown_fraction) * rung_flops, rung_flops)


def check_rung(
    rung_flops: float,
    *,
    step_flops: float,
    cooldown_fraction: float,
    freeze_at_flops: float | None = None,
    catalogue_flops: float = 0.0,
    stage2_step_flops: float | None = None,
) -> int:
    """Steps that a configuration takes to a rung, by the mean cost of its steps.

    Raises InfeasibleError where fewer than 100 steps fit, where one step (or the embedding of the catalogue) is so
    large that the row could miss C by more than 1 %, or where stage 2 would not begin on the rung's trunk.
    """
    c = format_flops(rung_flops)
    last_step_flops = step_flops
    if freeze_at_flops is None:
        steps = int(rung_flops // step_flops)
    else:
        assert stage2_step_flops is not None, "stage 2 needs the cost of its steps"
        trunk_end = trunk_flops(rung_flops, cooldown_fraction)
        if freeze_at_flops + catalogue_flops + stage2_step_flops > trunk_end:
            raise InfeasibleError(
                f"stage 2 begins at {format_flops(freeze_at_flops)} FLOPs and embedding the catalogue takes "
                f"{format_flops(catalogue_flops)}, which is not below the end of the trunk of rung {c}",
                key="freeze_at_flops",
                fix=f"freeze earlier than {format_flops(max(trunk_end - catalogue_flops, 0.0))} FLOPs",
            )
        last_step_flops = stage2_step_flops
        left_flops = rung_flops - freeze_at_flops - catalogue_flops
        steps = int(freeze_at_flops // step_flops) + int(left_flops // stage2_step_flops)
    if steps < MIN_STEPS or last_step_flops > TOLERANCE * rung_flops:
        raise InfeasibleError(
            f"rung {c} is {steps} steps of {format_flops(last_step_flops)} FLOPs; "
            f"a row needs at least {MIN_STEPS} and its last step within {TOLERANCE:.0%} of C",
            key="groups_per_step",
            fix="use a smaller batch or model, or a higher rung",
        )
    return steps
