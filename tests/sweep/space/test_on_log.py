"""What a log decides where a space leaves it open."""

import pytest

from bfm.events.protocol import Protocol
from bfm.sweep.space.on_log import on_log
from bfm.sweep.space.spec import from_dict
from bfm.training.config import log_defaults
from tests.helpers import make_shards

SPACE = {
    "name": "toy",
    "metric": {"name": "nll"},
    "method": "random",
    "parameters": {"params": {"values": [5e3]}},
    "budget": {"ladder_flops": ["4e8"], "total_flops": "2e9"},
    "data": {"shards": "toy"},
}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("filtered") / "toy", filter_seen=True)


def placed(spec, shards):
    return on_log(spec, shards, Protocol.load(shards))


def space(**parameters):
    return from_dict({**SPACE, "parameters": {**SPACE["parameters"], **parameters}})


def test_nothing_is_copied_where_lists_leave_out_seen_items(toy_shards, filtered):
    assert placed(space(), filtered).config({}).copy == "none"
    assert placed(space(), toy_shards).config({}).copy == "pointer"
    assert placed(placed(space(), filtered), filtered) == placed(space(), filtered)


def test_the_users_word_stands(filtered):
    window = {"window": {"value": 32}}
    for choice in ({"value": "pointer"}, {"values": ["pointer", "none"]}):
        assert placed(space(copy=choice, **window), filtered) == space(copy=choice, **window)


@pytest.mark.parametrize(
    ("history_length", "window", "group_windows"), [(3, 64, 16), (150, 128, 8), (504, 512, 2), (1e6, 512, 2)]
)
def test_a_window_is_as_long_as_histories_are(history_length, window, group_windows):
    assert log_defaults((), False, history_length) == {"window": window, "group_windows": group_windows}
    assert log_defaults(("group_windows",), False, history_length) == {"window": window}
    assert log_defaults(("window",), False, history_length) == {}
