"""The evaluation protocol: which positions are queries, frozen once per shard set, and what their targets are.

A query is (user, position): the user's history up to and including `position` is known. Its next event lies in the
part. Headline queries have their next event at a later timestamp; all distinct items of that timestamp are targets.
Basket queries have it at the same timestamp; targets are the distinct items that are left of it. Targets never leave
the query's part.

Order of a table: headline queries first, then basket queries; inside each, round-robin over users in a seeded order
(every user's first query, then every user's second, ...). So the first n rows are themselves a user-stratified sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from bfm.errors import UserError
from bfm.events.encoding import map_array
from bfm.events.manifest import SHARD_SET
from bfm.events.repeats import rule_facts, rule_words
from bfm.events.shards import Shards, Span
from bfm.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json
from bfm.ragged import Ragged, distinct, place_in_run, runs
from bfm.randomness import keyed, mix64, stream_key
from bfm.sealed import check_files

PROTOCOL = "protocol.json"
PARTS = ("validation", "test")
BASKET_DIVISOR = 4
TARGET_RULE = "distinct items of all events of the next timestamp, inside the part"
_SPARE_CANDIDATES = 1 << 20
_CHUNK_QUERIES = 1 << 16


@dataclass(frozen=True)
class QueryTable:
    """Queries, or a slice of them (`table[a:b]`)."""

    user: np.ndarray
    """Int64 [Q], global user index."""
    position: np.ndarray
    """Int64 [Q], index of the last known event in the user's history."""
    basket: np.ndarray
    """Bool [Q]; False = headline."""
    filter_seen: bool = False
    """Items of the history are in no list: one that is a target all the same is a miss."""

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, rows: slice | np.ndarray) -> QueryTable:
        """A subset of the queries."""
        return QueryTable(self.user[rows], self.position[rows], self.basket[rows], self.filter_seen)

    @property
    def num_headline(self) -> int:
        """Headline queries; they stand first."""
        return int((~self.basket).sum())


@dataclass(frozen=True)
class Protocol:
    """A shard set's frozen protocol."""

    info: dict[str, Any]
    tables: dict[str, QueryTable]

    @classmethod
    def load(cls, shards: Shards) -> Protocol:
        """Read the protocol. Raises CorruptError that names a file that is missing or was altered."""
        files = shards.manifest.files
        check_files(shards.path, {name: files[name] for name in (PROTOCOL, *map(table_name, PARTS))})
        info = read_json(shards.path / PROTOCOL)
        columns = {part: map_array(shards.path / table_name(part)) for part in PARTS}
        return cls(info, {part: _table(columns[part], info["filter_seen"]) for part in PARTS})

    @cached_property
    def hash(self) -> str:
        """Identity of the protocol: rows of different protocols are never compared."""
        return sha256_bytes(canonical_json(self.info))

    @property
    def filter_seen(self) -> bool:
        """Whether items of the query's history are in no list."""
        return bool(self.info["filter_seen"])

    @property
    def seen_rule(self) -> str:
        """The rule about seen items and its reason, for people."""
        return rule_words(self.info)

    def queries(self, part: str) -> QueryTable:
        """The queries of `validation` or `test`; headline first. Raises UserError for another part."""
        if part not in self.tables:
            raise UserError(f"there is no part {part!r}", key="part", fix=f"use one of {', '.join(PARTS)}")
        return self.tables[part]


def table_name(part: str) -> str:
    """File of a part's queries: int64 [3, Q] (user, position, basket)."""
    return f"protocol-{part}.npy"


def _table(columns: np.ndarray, filter_seen: bool) -> QueryTable:
    return QueryTable(columns[0], columns[1], columns[2].astype(bool), filter_seen)


# ---------------------------------------------------------------- building


def build_protocol(
    shards: Shards, *, repeats: Mapping[str, int], queries: int | None, filter_seen: bool | None, seed: int
) -> Protocol:
    """Choose the queries of both parts and write protocol.json and its tables into the shard set (before `finish`).

    Args:
        shards: opened from a draft manifest.
        repeats: what `training_repeats` counts in them.
        queries: headline queries per part (and a quarter as many basket queries); None takes all of them.
        filter_seen: keep items of a query's history out of its list; None: as the log's repeats say (repeats.py).
        seed: of the sample and its order.

    Raises:
        UserError: the validation part has no headline query.
    """
    rule = rule_facts(repeats, filter_seen)
    parts, tables = {}, {}
    for number, part in enumerate(PARTS):
        key = stream_key(seed, 0x9107, number)
        headline, num_headline = _sample(shards, part, key, basket=False, limit=queries)
        allowed = (num_headline if queries is None else queries) // BASKET_DIVISOR
        basket, num_basket = _sample(shards, part, key, basket=True, limit=allowed)
        if part == "validation" and num_headline == 0:
            raise UserError(
                "no query for validation: no user has an event in the validation range after an earlier event",
                file=str(shards.path),
                key="split",
                fix="give a larger validation share, an earlier split or a longer log",
            )
        columns = np.concatenate([headline, basket], axis=1)
        table = _table(columns, rule["filter_seen"])
        np.save(shards.path / table_name(part), columns, allow_pickle=False)
        parts[part] = {
            "queries": headline.shape[1],
            "candidates": num_headline,
            "basket_queries": basket.shape[1],
            "basket_candidates": num_basket,
            "users": len(np.unique(table.user)),
            "sha256": sha256_file(shards.path / table_name(part)),
            **_target_summary(shards, table),
        }
        tables[part] = table
    info: dict[str, Any] = {
        "version": SHARD_SET.version,
        "seed": seed,
        "catalogue": shards.num_catalogue,
        "split": shards.manifest.split,
        "parts": parts,
        **rule,
        "ties": "half",
        "target_rule": TARGET_RULE,
    }
    write_json(shards.path / PROTOCOL, info)
    return Protocol(info, tables)


def _candidates(shards: Shards, part: str, users: slice) -> Span:
    """Positions of users that may be queries: the event after one lies in the part."""
    if part == "validation":
        start, stop = shards.train_lengths[users], shards.valid_lengths[users]
    else:
        start, stop = shards.valid_lengths[users], np.diff(shards.user_starts[users.start : users.stop + 1])
    first = np.maximum(start - 1, 0)
    return first, np.maximum(stop - 1 - first, 0)


def _sample(shards: Shards, part: str, key: np.uint64, *, basket: bool, limit: int | None) -> tuple[np.ndarray, int]:
    """Int64 [3, <= limit] queries in protocol order, and how many candidates there were. Memory: O(limit)."""
    limit = shards.manifest.events if limit is None else limit
    kept, num_found = [np.zeros((3, 0), np.int64)], 0
    for user, position, event in shards.user_events(partial(_candidates, shards, part)):
        now, following = shards.time_at(event), shards.time_at(event + 1)
        wanted = (now == following) if basket else (now < following)
        found = np.stack([user[wanted], position[wanted]])
        num_found += found.shape[1]
        kept.append(_ranked(found, key))
        if sum(part.shape[1] for part in kept) > 2 * limit + _SPARE_CANDIDATES:
            kept = [_first(np.concatenate(kept, axis=1), key, limit)]
    chosen = _first(np.concatenate(kept, axis=1), key, limit)
    flags = np.full((1, chosen.shape[1]), basket, np.int64)
    return np.concatenate([chosen[:2], flags]), num_found


def _ranked(found: np.ndarray, key: np.uint64) -> np.ndarray:
    """Append each query's rank among its user's queries, in a seeded order: [3, n]."""
    user, position = found
    order = np.lexsort((keyed(key, mix64(user) + position.astype(np.uint64)), user))
    user, position = user[order], position[order]
    return np.stack([user, position, place_in_run(user)])


def _first(ranked: np.ndarray, key: np.uint64, limit: int) -> np.ndarray:
    """The first `limit` of (rank, seeded order of users)."""
    user, _, rank = ranked
    order = np.lexsort((keyed(key, user), rank))
    return ranked[:, order[:limit]]


# ---------------------------------------------------------------- targets


def query_targets(shards: Shards, queries: QueryTable) -> Ragged:
    """Distinct target items of each query, cold ones included (ids >= V)."""
    user, following = queries.user, queries.position + 1
    start = shards.user_starts[user]
    bounds = np.stack([shards.train_lengths[user], shards.valid_lengths[user], shards.user_starts[user + 1] - start])
    end = start + bounds.min(axis=0, initial=np.iinfo(np.int64).max, where=bounds > following)
    first = start + following
    time = shards.time_at(first)
    length = np.ones(len(user), np.int64)
    active = np.arange(len(user))
    while len(active):
        candidate = first[active] + length[active]
        active, candidate = active[candidate < end[active]], candidate[candidate < end[active]]
        same = shards.time_at(candidate) == time[active]
        active = active[same]
        length[active] += 1
    return distinct_items(shards, first, length)


def seen_items(shards: Shards, queries: QueryTable) -> Ragged | None:
    """Items of each query's known history, where lists leave them out."""
    if not queries.filter_seen:
        return None
    return distinct_items(shards, shards.user_starts[queries.user], queries.position + 1)


def distinct_items(shards: Shards, first: np.ndarray, length: np.ndarray) -> Ragged:
    """Distinct items of runs of events: `length` events from the global index `first`, one run per query."""
    query = np.repeat(np.arange(len(first)), length)
    item = shards.item_at(runs(first, length)).astype(np.int64)
    pair = distinct(query * shards.num_items + item)
    offsets = np.searchsorted(pair, np.arange(len(first) + 1) * shards.num_items)
    return Ragged((pair % shards.num_items).astype(np.int32), offsets.astype(np.int64))


def _target_summary(shards: Shards, table: QueryTable) -> dict[str, Any]:
    """Counts and the sha256 of all targets: the hash of the protocol covers the answers too."""
    digest, targets, cold = hashlib.sha256(), 0, 0
    for start in range(0, len(table), _CHUNK_QUERIES):
        piece = query_targets(shards, table[start : start + _CHUNK_QUERIES])
        digest.update(np.diff(piece.offsets).astype("<i8").tobytes() + piece.ids.astype("<i4").tobytes())
        targets += len(piece.ids)
        cold += int((piece.ids >= shards.num_catalogue).sum())
    return {"targets": targets, "cold_targets": cold, "targets_sha256": digest.hexdigest()}
