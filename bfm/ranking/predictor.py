"""An exported model at work: the first k items for every user, and the users' vectors.

Enters: the folder of an export; parts of encoded histories (bfm.events.histories), or queries of a shard set. Leaves:
lists of item ids with scores, or a Parquet file with one row per user, written as the parts come. The query is always
"what comes at a later timestamp". Needs neither the training code nor the engines.

Q = queries, I = all items, V = catalogue items, N = items new to the export, D = retrieval width, k = list length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from bfm.errors import UserError
from bfm.events.encoding import Encoding, Part
from bfm.events.neighbours import Neighbours
from bfm.events.protocol import QueryTable, Ragged, distinct_items
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.model.sizing import Shape
from bfm.model.two_part import ItemStore, TwoPartModel
from bfm.objective.catalogue import FrozenCatalogue, embedder_hash
from bfm.ranking.exported import CATALOGUE, NEIGHBOURS, WEIGHTS, open_sealed
from bfm.ranking.queries import answer
from bfm.ranking.ranks import rank_targets

_ROW_GROUP_USERS = 4096
_EMBED_ITEMS = 8192


@dataclass(frozen=True)
class Top:
    """What the model answers to Q queries."""

    item_Qk: np.ndarray
    """Int64 ids by falling score; -1 where filtering leaves fewer than k items."""
    score_Qk: np.ndarray
    """Float32 log probabilities, of a softmax alone logits scale * <h, v>; -inf beside -1."""
    h_QD: np.ndarray
    """Float32 unit vectors of the users."""


class Predictor:
    """A loaded export."""

    def __init__(
        self,
        model: TwoPartModel,
        catalogue: FrozenCatalogue,
        encoding: Encoding,
        window: int,
        filter_seen: bool,
    ) -> None:
        self.model, self.catalogue, self.encoding = model, catalogue, encoding
        self.window, self.filter_seen = window, filter_seen
        self._new_ND = torch.zeros(0, model.shape.d_item, device=model.device)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Predictor:
        """Read and verify an export.

        Raises:
            UserError: there is none, it is of another version, or its weights are not of this code's model.
            CorruptError: a file is missing or damaged, or its catalogue is not what the model computes.
        """
        folder = Path(folder)
        facts = open_sealed(folder)
        encoding = Encoding.read(folder, facts["encoding"])
        item_fields = [field for field in encoding.fields if field.side == "item"]
        store = ItemStore(item_fields, encoding.item_arrays)
        try:
            shape, neighbours = Shape(**facts["shape"]), None
            if shape.counted_events:
                neighbours = Neighbours.from_bytes((folder / NEIGHBOURS).read_bytes())
            model = TwoPartModel(
                shape,
                encoding.fields,
                store,
                encoding.has_clock,
                int(facts["table_width"]),
                seed=0,
                neighbours=neighbours,
            )
            model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        except (RuntimeError, TypeError) as error:
            # The files are whole: this code builds another model than the one that wrote them.
            reason = str(error).splitlines()[-1].strip()
            what = f"weights of code {facts['code_version']} do not fit this code's model ({reason})"
            raise UserError(what, file=str(folder), fix="export the checkpoint again") from error
        model = model.to(device).eval()
        key = embedder_hash(model, facts["fields_hash"])
        catalogue = FrozenCatalogue.load(Store(folder), CATALOGUE, key, (store.num_items, shape.d_item), device)
        catalogue.verify(model)
        return cls(model, catalogue, encoding, int(facts["window"]), bool(facts["filter_seen"]))

    def check_k(self, k: int) -> None:
        """Raise UserError where lists of k items cannot be made."""
        if not 1 <= k <= self.encoding.catalogue:
            fix = f"use 1 to {self.encoding.catalogue}, the number of items in the catalogue"
            raise UserError(f"lists of {k} items cannot be made", key="--k", fix=fix)

    @torch.no_grad()
    def add_items(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Embed items that histories may hold beside the export's: their ids follow it. They are never recommended."""
        fields = [field for field in self.encoding.fields if field.side == "item"]
        if len(arrays[fields[0].name]) == 0:
            return
        store = ItemStore(fields, arrays)
        packed, parts = store.packed(self.model.device), [self._new_ND[:0]]
        for ids in torch.arange(store.num_items, device=self.model.device).split(_EMBED_ITEMS):
            chosen = packed.take(ids)
            parts.append(self.model.embedder(chosen.ids_NS, store.layout.features(chosen, None)))
        self._new_ND = torch.cat(parts)

    @torch.no_grad()
    def top(self, shards: Shards, queries: QueryTable, k: int) -> Top:
        """The first k items of the catalogue for each query; `queries.filter_seen` takes out those of its history.

        Memory grows with the queries: k items and one vector each, and the items of their histories where filtered.
        Raises DivergedError where a score is not finite.
        """
        self.check_k(k)
        num_catalogue = self.encoding.catalogue
        answers = answer(self.model, self._item_vectors, shards, queries, self.window, num_catalogue)
        seen = None
        if queries.filter_seen:
            seen = distinct_items(shards, shards.user_starts[queries.user], queries.position + 1)
        no_targets = Ragged(np.zeros(0, np.int32), np.zeros(len(queries) + 1, np.int64))
        scores = answers.scores(self.catalogue.vectors_ID[:num_catalogue].float())
        ranked = rank_targets(scores, no_targets, num_catalogue, k, seen)
        return Top(ranked.top_Qk, ranked.top_score_Qk, answers.h_QD.cpu().numpy())

    def write(
        self,
        parts: Iterable[Part],
        path: Path,
        *,
        k: int = 10,
        vectors: bool = False,
        filter_seen: bool | None = None,
        progress: Callable[[int, int], None] = lambda users, events: None,
    ) -> dict[str, int]:
        """Write one row per user to a Parquet file, a row group per 4,096 users.

        Columns: user; items (keys as text; structs where an item has several columns); scores; events, how many the
        user has; vector, where `vectors`. A user without a usable event has empty lists and no vector.

        Args:
            parts: histories.
            path: the file; it must not be looked at before this returns.
            k: list length.
            vectors: also write user vectors.
            filter_seen: leave out items of the user's history; None: as in the protocol of the export's shard set.
            progress: called with the numbers of users and events that are done.

        Returns:
            users, users_without_event, short_lists.
        """
        self.check_k(k)
        filter_seen = self.filter_seen if filter_seen is None else filter_seen
        counts = {"users": 0, "users_without_event": 0, "short_lists": 0}
        events = 0
        with pq.ParquetWriter(path, self._schema(vectors)) as writer:
            for part in parts:
                for table, short in self._part_rows(part, k, filter_seen, writer.schema):
                    writer.write_table(table)
                    counts["users"] += table.num_rows
                    counts["short_lists"] += short
                    events += pc.sum(table["events"]).as_py()
                    progress(counts["users"], events)
                counts["users_without_event"] += len(part.without_event)
        return counts

    def _part_rows(self, part: Part, k: int, filter_seen: bool, schema: pa.Schema) -> Iterator[tuple[pa.Table, int]]:
        """Rows of the output, and how many of their lists are shorter than k though the user has events."""
        last = part.shards.user_lengths[: len(part.users)] - 1
        for start in range(0, len(last), _ROW_GROUP_USERS):
            position = last[start : start + _ROW_GROUP_USERS]
            user = np.arange(start, start + len(position))
            top = self.top(part.shards, QueryTable(user, position, np.zeros(len(user), bool), filter_seen), k)
            columns = self._columns(top, part.users.slice(start, len(user)), position + 1, schema)
            yield pa.table(columns, schema=schema), int((top.item_Qk[:, -1] < 0).sum())
        if len(part.without_event):
            yield pa.table(self._no_lists(part.without_event, schema), schema=schema), 0

    def _item_vectors(self, ids_U: Tensor) -> Tensor:
        """Float32 vectors [U, D] of known and new items."""
        known_U = ids_U < self.encoding.num_items
        if known_U.all():
            return self.catalogue.vectors_ID[ids_U].float()
        v_UD = self._new_ND.new_empty(len(ids_U), self._new_ND.shape[1])
        v_UD[known_U] = self.catalogue.vectors_ID[ids_U[known_U]].float()
        v_UD[~known_U] = self._new_ND[ids_U[~known_U] - self.encoding.num_items]
        return v_UD

    # ---------------------------------------------------------------- output

    def _schema(self, vectors: bool) -> pa.Schema:
        keys = self.encoding.item_keys
        text = pa.large_string()
        item = text if keys.num_columns == 1 else pa.struct([(name, text) for name in keys.column_names])
        columns = [
            ("user", text),
            ("items", pa.list_(item)),
            ("scores", pa.list_(pa.float32())),
            ("events", pa.int64()),
        ]
        if vectors:
            columns.append(("vector", pa.list_(pa.float32(), self.model.shape.d_item)))
        return pa.schema(columns)

    def _columns(self, top: Top, users: pa.Array, events: np.ndarray, schema: pa.Schema) -> dict[str, pa.Array]:
        listed_Qk = top.item_Qk >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(listed_Qk.sum(1))]), pa.int32())
        keys = self.encoding.item_keys.take(pa.array(top.item_Qk[listed_Qk]))
        parts = [column.combine_chunks() for column in keys.columns]
        items = parts[0] if len(parts) == 1 else pa.StructArray.from_arrays(parts, keys.column_names)
        columns = {
            "user": users,
            "items": pa.ListArray.from_arrays(offsets, items),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(top.score_Qk[listed_Qk])),
            "events": pa.array(events),
        }
        if "vector" in schema.names:
            flat = pa.array(np.ascontiguousarray(top.h_QD).reshape(-1))
            columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, top.h_QD.shape[1])
        return columns

    @staticmethod
    def _no_lists(users: pa.Array, schema: pa.Schema) -> dict[str, pa.Array]:
        empty = {name: pa.array([[]] * len(users), schema.field(name).type) for name in ("items", "scores")}
        columns = {"user": users, **empty, "events": pa.array(np.zeros(len(users), np.int64))}
        return {name: columns.get(name, pa.nulls(len(users), schema.field(name).type)) for name in schema.names}
