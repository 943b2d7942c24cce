"""The first space for a log and a budget: it can be planned, its sizes bracket the middle one, and a log that is too
short or a budget that is too small is said."""

from __future__ import annotations

import pytest

from bfm.errors import UserError
from bfm.events.protocol import Protocol
from bfm.sweep.plan.machine import Machine
from bfm.sweep.plan.plan import plan
from bfm.sweep.space.on_log import open_space
from bfm.sweep.space.propose import middle_size, propose
from bfm.sweep.space.spec import resolve
from tests.helpers import make_shards


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("log") / "shards", users=2000, items=300, max_events=200)


def proposed(log, flops):
    return propose(log, Protocol.load(log), str(log.path), flops, slots=2, gpus=0)


def planned(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    opened = open_space(resolve(path))
    return plan(opened.spec, opened.costs, Machine(cores=2, gpus=0, memory_gib=8.0)), opened


def test_a_proposal_can_be_planned_and_every_rung_has_trials(log, tmp_path):
    proposal = proposed(log, 2e12)
    made, opened = planned(tmp_path, proposal.text())
    assert made.feasible_share > 0.5
    assert all(rung.trials >= 2 for rung in made.rungs)
    assert opened.spec.budget.total_flops == 2_000_000_000_000
    assert all(f"# {note}" in proposal.text() for note in proposal.notes)


def test_sizes_bracket_the_middle_one_at_every_rung(log, tmp_path):
    made, _ = planned(tmp_path, proposed(log, 2e12).text())
    for rung in made.rungs:
        assert rung.params[0] < middle_size(rung.rung_flops) < rung.params[1]


def test_more_than_the_log_can_teach_is_not_proposed_and_it_is_said(log):
    proposal = proposed(log, 1e18)
    assert proposal.total_flops < 1e18
    assert proposal.notes[0].startswith("less than was given")
    assert sum("less than was given" in note for note in proposal.notes) == 1


def test_too_small_a_budget_is_refused_with_what_would_do(log):
    with pytest.raises(UserError, match="fewer than two rungs") as refused:
        proposed(log, 1e6)
    assert refused.value.key == "--flops"
    enough = float(refused.value.fix.split()[1])
    assert len(proposed(log, 1.05 * enough).ladder_flops) >= 2


@pytest.mark.parametrize("flops", [1.26e12, 1.46e12, 1.999e12, 2e12, 1.4e12])
def test_the_proposed_cap_is_no_more_than_was_given(log, tmp_path, flops):
    _, opened = planned(tmp_path, proposed(log, flops).text())
    assert 0.9 * flops < opened.spec.budget.total_flops <= flops
