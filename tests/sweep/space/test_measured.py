"""What a space says it measures: the axis must vary, a critical batch needs span and probes, probes may be a range."""

from __future__ import annotations

import pytest

from bfm.errors import UserError
from bfm.sweep.ledger.changes import check_changes
from bfm.sweep.space.measured import AXES, read_probes
from bfm.sweep.space.spec import from_dict
from tests.sweep.world import make_spec

PROBES = {"count": 5, "from": "1e8", "to": "1e10"}
BATCHES = {"params": {"value": 1000}, "groups_per_step": {"values": [1, 4, 16]}}
STAGE_2 = {"params": {"values": [1000, 2000]}, "freeze_at_flops": {"value": 1e8}, "negatives": {"value": 64}}


def test_probes_may_be_so_many_on_a_log_scale():
    assert make_spec(probes=PROBES).probes == (10**8, 316227766, 10**9, 3162277660, 10**10)
    assert make_spec(probes=["1e9", 2_000_000]).probes == (2_000_000, 10**9)
    spec = make_spec(probes=PROBES)
    assert spec.as_dict()["probes"] == list(spec.probes)
    assert from_dict(spec.as_dict()) == spec


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"count": 5, "from": 1e8}, "is no list and no range of probes"),
        ({"count": 1, "from": 1e8, "to": 1e9}, "are no range"),
        ({"count": 5, "from": 1e9, "to": 1e9}, "are no range"),
        ({"count": 5, "from": 0, "to": 1e9}, "are no range"),
        ({"count": 2.5, "from": 1, "to": 1e9}, "not a whole number"),
        ({"count": 5, "from": "x", "to": 1e9}, "is not a number"),
    ],
)
def test_a_range_of_probes_that_is_none_is_refused(value, what):
    with pytest.raises(UserError, match=what):
        read_probes(value)
    with pytest.raises(UserError, match=r"^probes"):
        make_spec(probes=value)


@pytest.mark.parametrize("value", [{"count": 100_000_000, "from": 1e8, "to": 1e9}, 3, "1e9", None])
def test_probes_are_a_list_or_a_range(value):
    with pytest.raises(UserError, match=r"^probes"):
        make_spec(probes=value)


@pytest.mark.parametrize(("axis", "name"), AXES.items())
def test_what_is_measured_must_vary(axis, name):
    others = {**STAGE_2, "params": {"value": 1000}}
    with pytest.raises(UserError, match=f"^parameters.{name}: a space of axis {axis} varies {name}"):
        make_spec(axis=axis, parameters={"learning_rate": {"value": 1e-3}, **others})
    varied = {name: {"values": [0.1, 0.2] if axis == "embedder_share" else [100, 200, 1600]}}
    spec = make_spec(axis=axis, parameters={**others, **varied}, probes=PROBES)
    assert spec.axis == axis
    assert from_dict(spec.as_dict()).axis == axis


def test_a_critical_batch_needs_span_and_probes():
    assert make_spec(axis="batch", parameters=BATCHES, probes=PROBES).probes
    with pytest.raises(UserError, match=r"^probes: steps and events to a target"):
        make_spec(axis="batch", parameters=BATCHES)
    narrow = {**BATCHES, "groups_per_step": {"min": 2, "max": 31}}
    with pytest.raises(UserError, match=r"^parameters.groups_per_step: spans 15.5x.*from 2 to 32"):
        make_spec(axis="batch", parameters=narrow, probes=PROBES)


def test_an_unknown_axis_has_a_near_one():
    with pytest.raises(UserError, match="did you mean 'embedder_share'"):
        make_spec(axis="embeder_share")


def test_a_ledger_from_before_axes_goes_on():
    before = make_spec().as_dict()
    del before["axis"]
    assert check_changes(before, make_spec(), extend=False) == []
    named = make_spec(axis="allocation")
    with pytest.raises(UserError, match=r"^axis: .*add --extend"):
        check_changes(before, named, extend=False)
    assert check_changes(before, named, extend=True) == ["axis"]
