"""A raw log to whole histories of its users, encoded as a shard set's own, in memory bounded for any length of log.

Enters: an `Encoding`, log files, a scratch folder. Leaves: `Part`s of bounded size, counts of what was read, and the
encoded fields of items that the encoding does not know (their ids follow the known ones).

Rows are cleaned, hashed and numbered chunk by chunk, spread over files and gathered by user (spread.py). Inside a part,
order is that of a preparation: user, time, seeded hash of the whole cleaned row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bfm.events import clean, fitting
from bfm.events.account import Reading, check_reading
from bfm.events.clean import Losses
from bfm.events.encoding import Encoding
from bfm.events.hashing import hash_column, order_events
from bfm.events.items import ITEM_ID, POPULARITY, Items, choose_values, count_values, known_keys
from bfm.events.log_files import find_logs
from bfm.events.parts import write_part
from bfm.events.schema import EventSchema
from bfm.events.shards import Shards
from bfm.events.spread import SPREAD, gather, num_partitions, write_spread
from bfm.tables.pieces import Piece
from bfm.tables.understood import read_as
from bfm.tables.values import encoded, plain
from bfm.yaml import validate

PART_ROWS = 1 << 18
"""A part has so many rows to twice as many on average, and whole users."""
_TEXT = pa.large_string()


@dataclass(frozen=True)
class Part:
    """Some users of a log: whole histories, encoded as the shard set's own."""

    shards: Shards
    """Without training events."""
    users: pa.Array
    """Large strings [U]: keys of the shard's users."""
    without_event: pa.Array
    """Keys of users of whom no row is usable."""


class Histories:
    """A log, read once and gathered by user; `parts` may be iterated once."""

    def __init__(
        self,
        encoding: Encoding,
        logs: list[str],
        scratch: Path,
        *,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Read the whole log into `scratch` (an empty folder).

        Raises UserError where a file is missing, unreadable or lacks a column, or no row is usable.
        """
        self.encoding = encoding
        self.schema = validate(EventSchema, encoding.manifest.schema, file="the export's schema")
        self.reading = Reading()
        """What was read."""
        self.duplicates = 0
        """Repeated rows left out, where the schema says so."""
        self.new = NewItems(encoding, self.schema)
        found = find_logs(self.schema, logs)
        self.left_out = found.left_out
        """Hidden files and folders -> files."""
        cleaner = clean.Cleaner(self.schema, encoding.manifest.event_item_fields)
        pieces = cleaner.pieces(found.paths)
        self.read_as = read_as([(piece.path, piece.words()) for piece in pieces])
        """How files were understood that are not as usual."""
        self._scratch = scratch
        self._rows = scratch / "rows"
        self._rows.mkdir()
        self._read(cleaner, pieces, progress)
        check_reading([self.reading], cleaner.columns)
        if self.reading.reasons.total() == self.reading.rows:
            fix = "check that the log has the columns and formats of the training log"
            raise clean.nothing_usable(self.reading.reasons, fix)

    def parts(self) -> Iterator[Part]:
        """Every user once. A part's files are gone when the next one is asked for."""
        files = sorted(self._rows.iterdir())
        partitions = num_partitions(self.reading.rows, PART_ROWS)
        for index in range(partitions):
            table = gather(files, partitions, index)
            if table.num_rows:
                with TemporaryDirectory(dir=self._scratch) as folder:
                    yield self._part(table, Path(folder))

    def _read(self, cleaner: clean.Cleaner, pieces: list[Piece], progress: Callable[[float], None]) -> None:
        """Spread all rows over files."""
        chunks = 0
        for done, piece in enumerate(pieces):
            for cleaned in cleaner.read(piece):
                self.reading.add(cleaned)
                if cleaned.table.num_rows:
                    rows = self._number(cleaned.table)
                    hashed = hash_column(encoded(rows[clean.USER].combine_chunks()), self.encoding.manifest.seed)
                    rows = rows.append_column(SPREAD, pa.array(hashed)).sort_by(SPREAD)
                    write_spread(self._rows / f"{chunks:08d}", rows)
                    chunks += 1
            progress((done + 1) / len(pieces))

    def _number(self, cleaned: pa.Table) -> pa.Table:
        """Usable events with item ids and hashes, and one row without an item per user of unusable rows."""
        good = clean.usable(cleaned, self.encoding.manifest.seed)
        kept = [clean.USER, clean.TIME, clean.HASH, *map(clean.context_column, self.schema.context_fields)]
        events = pa.table({**{name: plain(good[name]) for name in kept}, clean.ITEM: self.new.number(good)})
        idle = plain(cleaned.filter(cleaned[clean.FAULT].is_valid())[clean.USER]).drop_null().unique()
        nulls = {f.name: pa.nulls(len(idle), f.type) for f in events.schema}
        return pa.concat_tables([events, pa.table({**nulls, clean.USER: idle}, schema=events.schema)])

    def _part(self, table: pa.Table, folder: Path) -> Part:
        events = table.filter(table[clean.ITEM].is_valid())
        user = plain(events[clean.USER]).dictionary_encode()
        codes, time = user.indices.to_numpy(), events[clean.TIME].to_numpy()
        order, repeated = order_events(codes, time, events[clean.HASH].to_numpy())
        if self.schema.clean.drop_duplicates:
            self.duplicates += int(repeated.sum())
            order = order[~repeated]
        offsets = np.searchsorted(codes[order], np.arange(len(user.dictionary) + 1))
        none = np.zeros(len(user.dictionary), np.int64)
        write_part(
            folder,
            item=events[clean.ITEM].to_numpy()[order],
            time=time[order],
            context=fitting.encode_context(events.take(pa.array(order)), self.encoding, self.reading.losses),
            user_offsets=offsets,
            train_end=none,
            valid_end=none,
            users=user.dictionary,
        )
        users = plain(table[clean.USER]).unique()
        without = users.filter(pc.invert(pc.is_in(users, value_set=user.dictionary)))
        items = self.encoding.num_items + len(self.new.ids)
        manifest = replace(self.encoding.manifest, users=len(none), events=len(order), items=items)
        return Part(Shards(folder, manifest), user.dictionary, without)


class NewItems:
    """Ids of items, and the first known field values of those that the encoding does not know."""

    def __init__(self, encoding: Encoding, schema: EventSchema) -> None:
        self.encoding, self.schema = encoding, schema
        self.ids: dict[str, int] = {}
        """Key -> id of each new item."""
        self.events = 0
        """Events of new items."""
        self._known = known_keys(encoding)
        self._values: dict[str, pa.Table] = {}
        """Field -> what `count_values` finds in the events of new items."""

    def number(self, good: pa.Table) -> np.ndarray:
        """Int32 ids of a chunk's events (as `clean.usable` gives them)."""
        item = good[clean.ITEM].combine_chunks()
        found = pc.index_in(item.dictionary, value_set=self._known)
        ids = found.fill_null(-1).to_numpy(zero_copy_only=False).copy()
        for code in np.flatnonzero(ids < 0):
            ids[code] = self.ids.setdefault(item.dictionary[code].as_py(), self.encoding.num_items + len(self.ids))
        item_E = ids[item.indices.to_numpy()]
        new = pa.array(item_E >= self.encoding.num_items)
        self.events += new.true_count
        count = np.zeros(len(item_E), np.int64)
        columns = {"item": item, "train_count": count, "first_time": good[clean.TIME], "first_hash": good[clean.HASH]}
        events = pa.table(columns).filter(new)
        for name in self.encoding.manifest.event_item_fields if len(events) else ():
            values = count_values(events.append_column("value", good[clean.item_column(name)].filter(new)))
            before = [self._values[name]] if name in self._values else []
            self._values[name] = count_values(pa.concat_tables([*before, values]))
        return item_E.astype(np.int32)

    def encode(self, losses: Losses) -> dict[str, np.ndarray]:
        """Encoded item fields [new items]; what an item table would have to say is missing."""
        keys, none = pa.array(list(self.ids), _TEXT), np.zeros(len(self.ids), np.int64)
        # The fields that every schema may have: the id itself, and a popularity that is zero so far.
        values = {ITEM_ID: keys, POPULARITY: pa.array(none.astype(np.float64))}
        for name, spec in self.schema.item_fields.items():
            texts = pa.nulls(len(keys), _TEXT)
            if name in self._values:
                texts = choose_values([self._values[name]], Items(keys, none, none))[0]
            values[name] = clean.from_text(texts, spec.kind)
        return fitting.encode_fields(values, self.encoding.item_fields, self.encoding.vocabularies, losses)
