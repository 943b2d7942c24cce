"""What is looked at before a run takes anything."""

from __future__ import annotations

import pytest

from bfm.errors import UserError
from bfm.sweep.plan import machine
from bfm.sweep.plan.machine import Machine, check_run, free_bytes
from bfm.sweep.space.tiers import Tier, tier_of_options
from bfm.units import GIB

PEAK = 1e11


@pytest.fixture
def here(monkeypatch):
    """A machine of 4 cores with one GPU, of which 8 GiB are free, and 2 GiB of its card."""
    monkeypatch.setattr(Machine, "here", lambda: Machine(4, 1, 16.0, 24.0))
    monkeypatch.setattr(machine, "free_bytes", lambda *, cuda: (2 if cuda else 8) * GIB)


def test_what_fits_is_said_nothing_of(here):
    check_run(Tier(), 8 * GIB, 1e15, PEAK)
    check_run(Tier(engine="deepspeed", workers=2), 4 * GIB, 1e15, PEAK)
    check_run(Tier(gpus=1), 2 * GIB, 1e15, PEAK)


@pytest.mark.parametrize(
    ("tier", "needed_gib", "flops", "key", "words"),
    [
        (Tier(), 8.1, 1e15, "params", "needs about 8.1 GiB of memory, 8 GiB are free"),
        (Tier(engine="deepspeed", workers=2), 4.1, 1e15, "params", "needs about 8.2 GiB of memory"),
        (Tier(gpus=1), 3, 1e15, "params", "needs about 3 GiB of memory, 2 GiB are free"),
        (Tier(), 1, 4e19, "--flops", "4e19 FLOPs take at least 12.7 years here; 1e11 FLOP/s is a worker's peak"),
        (Tier(gpus=2), 1, 1e15, "--gpus", "a task asks for 1 CPUs and 2 GPUs, this machine has 4 and 1"),
        (Tier(engine="deepspeed", workers=4), 1, 1e15, "--workers", "a task asks for 5 CPUs"),
    ],
)
def test_what_does_not_is_told_by_its_option(here, tier, needed_gib, flops, key, words):
    with pytest.raises(UserError) as caught:
        check_run(tier, round(needed_gib * GIB), flops, PEAK)
    assert caught.value.key == key
    assert words in str(caught.value)


def test_a_container_has_what_its_limit_leaves(tmp_path):
    assert free_bytes(cgroup=tmp_path) > 0
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 20}\n")
    assert free_bytes(cgroup=tmp_path) == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cgroup=tmp_path) > 2 << 20


def test_options_make_a_tier_or_name_what_is_wrong():
    assert tier_of_options(1, 1, 0.5, 2, "auto") == Tier(gpus=0.5, micro_groups=2)
    several = tier_of_options(2, 1, 1, 1, "two_pass")
    assert (several.engine, several.workers, several.zero_stage) == ("deepspeed", 2, 1)
    with pytest.raises(UserError, match="--gpus: 2 workers cannot share GPUs"):
        tier_of_options(2, 1, 0.5, 1, "auto")
