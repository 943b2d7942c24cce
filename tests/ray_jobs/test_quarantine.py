"""A node that spoils its tasks gets no more of them; one that is the last, or no worse than others, does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.quarantine import Quarantine

NODES = ["a", "b", "c"]


def test_two_trials_lost_where_others_bring_rows() -> None:
    quarantine = Quarantine()
    assert not quarantine.lost("a", "t0", NODES)
    assert not quarantine.lost("a", "t1", NODES), "nobody has done better yet"
    quarantine.row("b")
    assert not quarantine.lost("b", "t2", NODES)
    assert quarantine.lost("a", "t0", NODES)
    assert quarantine.nodes == {"a"}


def test_a_row_clears_a_node_and_one_trial_alone_blames_none() -> None:
    quarantine = Quarantine()
    quarantine.lost("a", "t0", NODES)
    quarantine.row("b")
    assert not quarantine.lost("a", "t0", NODES), "it may be the trial"
    quarantine.row("a")
    assert not quarantine.lost("a", "t1", NODES)


def test_what_would_end_the_sweep_ends_it_when_a_second_node_says_so() -> None:
    quarantine = Quarantine()
    assert quarantine.fatal("a", "no shards at /mnt", NODES)
    assert not quarantine.fatal("b", "no shards at /mnt", NODES)
    assert quarantine.fatal("b", "a damaged checkpoint", NODES)
    assert quarantine.nodes == {"a", "b"}


def test_two_nodes_say_the_same_where_a_storage_adds_its_own_words() -> None:
    what = "s3://b/trials/t{}/a.npy: access refused (403 in {}ms, <Error><RequestId>{}</RequestId></Error>)"
    quarantine = Quarantine()
    assert quarantine.fatal("a", what.format("00001", 1.505, "19D2A"), NODES)
    assert not quarantine.fatal("b", what.format("00007", 20.1, "7C11B"), NODES)
    assert quarantine.fatal("b", "a damaged checkpoint", NODES)


@given(
    st.lists(st.tuples(st.sampled_from(["row", "lost", "fatal"]), st.sampled_from(NODES), st.integers(0, 3))),
    st.integers(1, 3),
)
def test_a_node_is_always_left(events, num_nodes) -> None:
    quarantine, live = Quarantine(), NODES[:num_nodes]
    for kind, node, number in events:
        if kind == "row":
            quarantine.row(node)
        elif kind == "lost":
            quarantine.lost(node, f"t{number}", live)
        else:
            quarantine.fatal(node, f"fault {number}", live)
        assert set(live) - quarantine.nodes
