"""How much of behaviour repeats, and what follows for lists: whether items that a user had before are candidates.

A target of the training range is a distinct item of a timestamp that follows an earlier one of its user, as the targets
of headline queries are; it was seen where the user had the item at an earlier timestamp.

U = users, E = training events, B = distinct (user, timestamp, item).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bfm.events.shards import Shards
from bfm.ragged import distinct

NOISE = 0.01
"""Below this share of targets repeats are noise, and hiding seen items frees their places in a list."""


def training_repeats(shards: Shards) -> dict[str, int]:
    """Targets of the training range, and how many of them were `seen`, over all users."""
    targets = seen = 0
    for user_E, position_E, event_E in shards.user_events(shards.train_events):
        item_E, time_E = shards.item_at(event_E).astype(np.int64), shards.time_at(event_E)
        moment_E = np.cumsum((np.diff(time_E, prepend=time_E[:1]) != 0) | (position_E == 0))
        moment_B = distinct(moment_E * shards.num_items + item_E) // shards.num_items
        targets += len(moment_B) - int(np.isin(moment_B, moment_E[position_E == 0]).sum())
        # Of all the timestamps at which a user had an item, every one but the earliest is a repeat.
        seen += len(moment_B) - len(distinct(user_E * shards.num_items + item_E))
    return {"targets": targets, "seen": seen}


def are_noise(repeats: Mapping[str, int]) -> bool:
    """Whether so few targets were seen that lists are better without; never of a log without targets."""
    return repeats["seen"] < NOISE * repeats["targets"]


def rule_facts(repeats: Mapping[str, int], given: bool | None) -> dict[str, Any]:
    """What a protocol says of seen items: the schema's choice, or without one that of the log."""
    return {
        "filter_seen": are_noise(repeats) if given is None else given,
        "filter_seen_by": "log" if given is None else "schema",
        "training_repeats": dict(repeats),
    }


def rule_words(protocol: Mapping[str, Any]) -> str:
    """The rule of a protocol about seen items and its reason, as one line for people."""
    repeats = protocol["training_repeats"]
    share = repeats["seen"] / max(repeats["targets"], 1)
    what = "are filtered out of lists" if protocol["filter_seen"] else "stay in lists"
    default = f"by default, as that is {'under' if are_noise(repeats) else 'not under'} {NOISE:.0%}"
    why = default if protocol["filter_seen_by"] == "log" else "the schema's choice"
    return f"{what} ({share:.2%} of training targets are items that the user had before; {why})"
