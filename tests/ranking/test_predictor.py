"""Predictions of an export against evaluation on the shards, from the shards and from the raw log."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bfm.errors import CorruptError, UserError
from bfm.events import histories
from bfm.events.encoding import Encoding, write_items
from bfm.events.histories import Histories
from bfm.events.protocol import Protocol, QueryTable, query_targets
from bfm.files import Store
from bfm.predictions import predict_log, summary_text
from bfm.ranking.evaluate import evaluate
from bfm.ranking.metrics import summarise
from bfm.ranking.predictor import DTYPES, EXPORT, Predictor
from bfm.ranking.queries import answer
from bfm.ranking.ranks import rank_targets
from bfm.training.export import export_checkpoint
from tests.helpers import history_of, user_keys
from tests.ranking.shop import CONFIG, SCHEMA, make_shop


@pytest.fixture(scope="module")
def predictor(export):
    return Predictor.load(export)


def predict(export, logs, out, **settings):
    """Predictions by user, and the summary."""
    summary = predict_log(str(export), [str(log) for log in logs], out, **settings)
    return pq.read_table(out).to_pandas().set_index("user").sort_index(), summary


def headline_of_each_user(shards):
    """One query per user: the last event that a later timestamp follows."""
    users, positions = [], []
    for user in range(shards.num_users):
        time = history_of(shards, user).time
        followed = np.flatnonzero(time < time[-1])
        if len(followed):
            users.append(user)
            positions.append(followed[-1])
    return QueryTable(np.array(users), np.array(positions), np.zeros(len(users), bool))


@torch.no_grad()
def reference(shop, queries, k):
    """The ranking of evaluation: ids, scores and vectors."""
    model, shards = shop.model(), shop.shards
    vectors, num_items = model.embed_all(), shards.num_catalogue
    answers = answer(model, vectors, shards, queries, CONFIG.window, num_items)
    scores = answers.scores()(slice(0, len(queries)))(slice(0, num_items))
    top = rank_targets(
        lambda rows: lambda items: scores[rows, items].clone(), query_targets(shards, queries), num_items, k
    )
    return top.top_Qk, scores.numpy(), answers.h_QD.numpy()


def by_hand(lists, targets, k=10):
    """Mean recall, ndcg and mrr of delivered lists."""
    sums = dict.fromkeys(("recall", "ndcg", "mrr"), 0.0)
    for listed, wanted in zip(lists, targets, strict=True):
        places = [place for place, item in enumerate(listed, 1) if item in wanted]
        sums["recall"] += len(places) / len(wanted)
        sums["ndcg"] += sum(1 / np.log2(1 + place) for place in places) / sum(
            1 / np.log2(1 + place) for place in range(1, min(k, len(wanted)) + 1)
        )
        sums["mrr"] += 1 / places[0] if places else 0.0
    return {f"{name}@{k}": value / len(targets) for name, value in sums.items()}


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("repeats", [True, False])
def test_lists_are_worth_what_evaluation_says(tmp_path, repeats, asked):
    """Of leave-one-out with and without repeats, from the raw log of everything but each user's last event."""
    schema = SCHEMA.replace("time: time", "position: step")
    if asked is not None:
        schema += f"evaluation: {{filter_seen: {str(asked).lower()}}}\n"
    shop, export = make_export(tmp_path, schema, repeats)
    protocol = Protocol.load(shop.shards)
    assert protocol.filter_seen == ((not repeats) if asked is None else asked)
    last = shop.frame.groupby("user").step.transform("max") == shop.frame.step
    shop.frame[~last].to_parquet(tmp_path / "known.parquet")
    got, _ = predict(export, [tmp_path / "known.parquet"], tmp_path / "lists.parquet")
    wanted = shop.frame[last].astype({"user": str, "item": str}).set_index("user")["item"]
    users = [user for user in got.index if got.loc[user, "events"] > 1]
    metrics = summarise(evaluate(shop.model(), shop.shards, protocol, "test", CONFIG.window)).metrics
    worth = by_hand(got.loc[users, "items"], [{wanted[user]} for user in users])
    assert {name: metrics[name] for name in worth} == pytest.approx(worth, rel=1e-6)
    assert worth["recall@10"] > 0
    seen = shop.frame[~last].astype(str).groupby("user").item.agg(set)
    fresh = [user for user in users if wanted[user] not in seen[user]]
    assert (len(fresh) < len(users)) == repeats
    if protocol.filter_seen:
        unseen = by_hand(got.loc[fresh, "items"], [{wanted[user]} for user in fresh])
        assert {name: metrics[f"unseen.{name}"] for name in unseen} == pytest.approx(unseen, rel=1e-6)


def test_lists_of_many_targets_are_worth_what_evaluation_says(shop, predictor):
    protocol = Protocol.load(shop.shards)
    assert not protocol.filter_seen, "the shop's users buy again"
    table = protocol.queries("validation")
    table = table[~table.basket]
    targets = query_targets(shop.shards, table)
    worth = by_hand(predictor.top(shop.shards, table, 10).item_Qk, [targets[query] for query in range(len(table))])
    metrics = summarise(evaluate(shop.model(), shop.shards, protocol, "validation", CONFIG.window)).metrics
    assert {name: metrics[name] for name in worth} == pytest.approx(worth, rel=1e-6)


def test_a_raw_log_gives_what_the_shards_give_for_the_same_histories(shop, export, tmp_path):
    queries = headline_of_each_user(shop.shards)
    ids, scores, vectors = reference(shop, queries, 10)
    keys = user_keys(shop.shards).take(pa.array(queries.user)).to_pylist()
    ends = {
        key: history_of(shop.shards, u).time[p] for key, u, p in zip(keys, queries.user, queries.position, strict=True)
    }
    known = shop.frame[
        [1000 * t <= ends.get(str(u), -1) for u, t in zip(shop.frame.user, shop.frame.time, strict=True)]
    ]
    # Neither the order of rows nor the cut into files and formats may matter.
    mixed = known.sample(frac=1, random_state=0)
    mixed[::3].to_parquet(tmp_path / "a.parquet")
    mixed[1::3].to_csv(tmp_path / "b.csv", index=False)
    mixed[2::3].to_json(tmp_path / "c.jsonl", orient="records", lines=True)
    got, summary = predict(export, [tmp_path], tmp_path / "out.parquet", vectors=True)
    assert summary["users"] == len(queries) == len(got)
    assert summary["new_items"] == 0
    item_keys = shop.shards.items_table(["key_item"])["key_item"].to_numpy(zero_copy_only=False)
    for row, key in enumerate(keys):
        np.testing.assert_allclose(got.loc[key, "vector"], vectors[row], atol=2e-6)
        np.testing.assert_allclose(got.loc[key, "scores"], scores[row][ids[row]], atol=1e-4)
        assert got.loc[key, "items"].tolist() == item_keys[ids[row]].tolist()
        assert got.loc[key, "events"] == queries.position[row] + 1


def test_spilling_changes_nothing_and_bounds_the_parts(shop, export, predictor, tmp_path, monkeypatch):
    logs = [shop.folder / "log.parquet"]
    whole, _ = predict(export, logs, tmp_path / "whole.parquet", vectors=True)
    monkeypatch.setattr(histories, "PART_ROWS", 200)
    spilled, _ = predict(export, logs, tmp_path / "spilled.parquet", vectors=True)
    assert whole["items"].map(list).equals(spilled["items"].map(list))
    np.testing.assert_allclose(np.stack(whole["vector"]), np.stack(spilled["vector"]), atol=2e-6)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    parts = [
        (part.users.to_pylist(), part.shards.manifest.events)
        for part in Histories(predictor.encoding, [str(logs[0])], scratch).parts()
    ]
    users = [user for part, _ in parts for user in part]
    assert len(users) == len(set(users)) == shop.shards.num_users
    assert sum(events for _, events in parts) == len(shop.frame)
    assert len(parts) > 4
    assert max(events for part, events in parts if len(part) > 1) <= 3 * 200
    assert [path.name for path in scratch.iterdir()] == ["rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "spilled.parquet", "whole.parquet"]


def test_new_items_are_embedded_as_preparation_embeds_late_ones(shop, predictor, tmp_path):
    full, known = predictor.encoding, predictor.encoding.num_catalogue
    cut = Encoding(tmp_path / "cut", replace(full.manifest, items=known))
    shutil.copytree(full.path, cut.path)
    arrays = {name: values[:known] for name, values in full.item_arrays.items()}
    write_items(cut.path, full.items_table().slice(0, known), arrays, {})
    assert full.num_items - known > 0
    (tmp_path / "scratch").mkdir()
    histories = Histories(cut, [str(shop.folder / "log.parquet")], tmp_path / "scratch")
    late = full.item_keys["item"].to_pylist()[known:]
    assert sorted(histories.new.ids) == sorted(late)
    assert histories.new.events == shop.frame["item"].astype(str).isin(late).sum()
    arrays = histories.new.encode(histories.reading.losses)
    for place, key in enumerate(histories.new.ids):
        for name in ("item_id", "popularity", "words", "tags", "look"):
            np.testing.assert_array_equal(arrays[name][place], full.item_arrays[name][full_id(full, key)])
    # The item table is not in the log: its fields are missing.
    assert np.isnan(arrays["price"]).all()
    assert not arrays["colour"].any()


def full_id(encoding, key):
    return encoding.item_keys["item"].to_pylist().index(key)


def test_new_items_count_in_histories_and_are_never_listed(shop, export, tmp_path):
    frame = shop.frame.copy()
    frame.to_parquet(tmp_path / "log.parquet")
    plain, _ = predict(export, [tmp_path / "log.parquet"], tmp_path / "plain.parquet", vectors=True)
    last = frame.groupby("user").time.transform("max") == frame.time
    frame.loc[last, "item"] = 9000 + frame.loc[last, "user"] % 3
    frame.to_parquet(tmp_path / "log.parquet")
    got, summary = predict(export, [tmp_path / "log.parquet"], tmp_path / "new.parquet", vectors=True)
    assert summary["new_items"] == 3
    assert summary["new_item_events"] == last.sum()
    assert "3 in" in summary_text(summary)
    assert (got["events"] == plain["events"]).all()
    assert np.abs(np.stack(got["vector"]) - np.stack(plain["vector"])).max(1).min() > 1e-3
    known = set(shop.shards.items_table(["key_item"])["key_item"].to_pylist()[: shop.shards.num_catalogue])
    assert {item for items in got["items"] for item in items} <= known


def test_users_without_a_usable_row_have_empty_lists(shop, export, tmp_path, monkeypatch):
    frame = shop.frame.astype({"user": object, "time": object})
    frame.loc[frame.user == 7, "time"] = "soon"
    frame.loc[frame.index[frame.user == 8][0], "time"] = None
    frame.loc[frame.index[frame.user == 9][0], "user"] = None
    frame.astype(str).replace({"None": ""}).to_csv(tmp_path / "log.csv", index=False)
    for part_rows in (300, 1 << 19):
        monkeypatch.setattr(histories, "PART_ROWS", part_rows)
        got, summary = predict(export, [tmp_path / "log.csv"], tmp_path / "out", vectors=True)
        assert set(got.index) == {str(user) for user in shop.frame.user.unique()}
        assert len(got.loc["7", "items"]) == len(got.loc["7", "scores"]) == got.loc["7", "events"] == 0
        assert got.loc["7", "vector"] is None
        assert (got.drop("7")["items"].map(len) == 10).all()
        assert summary["users_without_event"] == 1
        assert summary["unusable"] == {
            "missing time": 1,
            "missing user": 1,
            "unparsable time": (shop.frame.user == 7).sum(),
        }


def test_filtering_leaves_out_what_the_user_has_seen(shop, export, tmp_path):
    k = shop.shards.num_catalogue
    logs = [shop.folder / "log.parquet"]
    kept, _ = predict(export, logs, tmp_path / "kept.parquet", k=k)
    got, summary = predict(export, logs, tmp_path / "filtered.parquet", k=k, filter_seen=True)
    seen = shop.frame.astype(str).groupby("user").item.agg(set)
    for user, row in got.iterrows():
        assert row["items"].tolist() == [item for item in kept.loc[user, "items"] if item not in seen[user]]
        assert len(row["scores"]) == len(row["items"])
        assert (np.diff(row["scores"]) <= 1e-5).all()
    assert summary["short_lists"] == len(got)


def test_a_bfloat16_catalogue_is_close(shop, predictor, tmp_path):
    export_checkpoint(shop.checkpoint, str(shop.shards.path), tmp_path / "half", "bfloat16")
    half = Predictor.load(tmp_path / "half")
    queries = headline_of_each_user(shop.shards)
    exact, close = (p.top(shop.shards, queries, 10) for p in (predictor, half))
    assert half.vectors_ID.dtype == torch.bfloat16
    np.testing.assert_allclose(exact.score_Qk, close.score_Qk, atol=0.3)
    assert np.abs(exact.score_Qk - close.score_Qk).max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_that_are_not_the_models_are_found(shop, tmp_path, dtype):
    export_checkpoint(shop.checkpoint, str(shop.shards.path), tmp_path / "export", dtype)
    loaded = Predictor.load(tmp_path / "export")
    assert torch.equal(loaded.vectors_ID, shop.model().embed_all().to(DTYPES[dtype]))
    for number, wrong in enumerate((0.05, float("nan"))):
        vectors = loaded.vectors_ID.clone()
        vectors[3, 2] += wrong
        folder = tmp_path / str(number)
        folder.mkdir()
        Predictor(loaded.model, vectors, loaded.encoding, loaded.window, loaded.filter_seen).save(folder, {})
        with pytest.raises(CorruptError, match="not what the model computes"):
            Predictor.load(folder)


def make_export(folder, schema, repeats=True):
    """Another shop and its export."""
    shop = make_shop(folder / "shop", 800, schema, repeats)
    export_checkpoint(shop.checkpoint, str(shop.shards.path), folder / "export")
    return shop, folder / "export"


def test_composite_items_are_structs(tmp_path):
    start = SCHEMA.index("item: item")
    schema = f"{SCHEMA[:start]}item: [item, shop]\nitem_fields: {{words: text}}\n"
    shop, export = make_export(tmp_path, schema)
    _, summary = predict(export, [shop.folder / "log.parquet"], tmp_path / "out.parquet", k=3)
    assert summary["new_items"] == 0
    pairs = {(str(row.item), row.shop) for row in shop.frame.itertuples()}
    for items in pq.read_table(tmp_path / "out.parquet")["items"].to_pylist():
        assert len(items) == 3
        assert {(item["item"], item["shop"]) for item in items} <= pairs


def test_positions_duplicates_and_the_filter_follow_the_schema(tmp_path):
    schema = SCHEMA.replace("time: time", "position: step") + "clean: {drop_duplicates: true}\n"
    schema += "evaluation: {filter_seen: true}\n"
    shop, export = make_export(tmp_path, schema)
    log = tmp_path / "log.parquet"
    once = shop.frame.drop_duplicates()
    once.to_parquet(log)
    plain, before = predict(export, [log], tmp_path / "out.parquet")
    pd.concat([once[1::2], once]).to_parquet(log)
    got, after = predict(export, [log], tmp_path / "out.parquet")
    assert (before["duplicates"], after["duplicates"]) == (0, len(once) // 2)
    assert got["items"].map(list).equals(plain["items"].map(list))
    seen = shop.frame.astype(str).groupby("user").item.agg(set)
    assert not any(seen[user] & set(items) for user, items in got["items"].items())


def test_bags_are_cut_as_preparation_cuts_them(tmp_path):
    """Context lists, and texts of items that the export does not know."""
    schema = SCHEMA.replace("words: text", "words: {kind: text, max_length: 2}").replace(
        'coupons: {kind: list, separator: "|"}', 'coupons: {kind: list, separator: "|", max_length: 1}'
    )
    shop, export = make_export(tmp_path, schema)
    cuts = shop.shards.manifest.checks["cuts"]
    assert {name: cut["kept"] for name, cut in cuts.items()} == {"words": 2, "coupons": 1}
    encoding = Predictor.load(export).encoding
    (tmp_path / "scratch").mkdir()
    histories = Histories(encoding, [str(shop.folder / "log.parquet")], tmp_path / "scratch")
    (part,) = histories.parts()
    place = {key: user for user, key in enumerate(part.users.to_pylist())}
    for user, key in enumerate(user_keys(shop.shards).to_pylist()):
        again = history_of(part.shards, place[key]).context["coupons"]
        np.testing.assert_array_equal(again, history_of(shop.shards, user).context["coupons"])
    assert histories.reading.losses["coupons", "cut"] == cuts["coupons"]["cut"]
    shop.frame.assign(item=9000 + shop.frame["item"]).to_parquet(tmp_path / "new.parquet")
    _, summary = predict(export, [tmp_path / "new.parquet"], tmp_path / "out.parquet")
    assert summary["cuts"] == {"coupons": cuts["coupons"]["cut"], "words": summary["new_items"]}
    assert "cut to the length kept in training: coupons" in summary_text(summary)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda frame: frame.drop(columns="quantity"), "has no column 'quantity'"),
        (lambda frame: frame[:0], "the log has no rows"),
        (lambda frame: frame.assign(time="soon"), "no row is usable"),
    ],
)
@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_wrong_log_is_refused_and_leaves_nothing(shop, export, tmp_path, change, what, ending):
    frame = change(shop.frame)
    log = tmp_path / f"log.{ending}"
    writers = {
        "parquet": lambda: frame.to_parquet(log),
        "csv": lambda: frame.to_csv(log, index=False),
        "jsonl": lambda: frame.to_json(log, orient="records", lines=True),
    }
    writers[ending]()
    with pytest.raises(UserError, match=what):
        predict(export, [log], tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == [log]


def test_wrong_requests_are_refused(shop, export, tmp_path):
    logs, out = [shop.folder / "log.parquet"], tmp_path / "out.parquet"
    for k in (0, shop.shards.num_catalogue + 1):
        with pytest.raises(UserError, match="--k"):
            predict(export, logs, out, k=k)
    with pytest.raises(UserError, match="no exported model"):
        predict(tmp_path, logs, out)
    with pytest.raises(UserError, match="is a folder"):
        predict(export, logs, tmp_path)
    with pytest.raises(UserError, match="no such file"):
        predict(export, [tmp_path / "none.parquet"], out)
    (tmp_path / "bad.parquet").write_bytes(logs[0].read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        predict(export, [tmp_path / "bad.parquet"], out)
    assert not out.exists()


def test_a_damaged_or_foreign_export_is_refused(shop, export, tmp_path):
    names = [path.relative_to(export) for path in export.rglob("*") if path.is_file()]
    assert len(names) >= 6
    for name in names:
        folder = tmp_path / "damaged"
        shutil.copytree(export, folder)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(CorruptError, match=str(name)):
            Predictor.load(folder)
        (folder / name).unlink()
        with pytest.raises(CorruptError if str(name) != EXPORT.file else UserError):
            Predictor.load(folder)
        shutil.rmtree(folder)
    shutil.copytree(export, tmp_path / "old")
    sealed = json.loads((export / EXPORT.file).read_text())
    (tmp_path / "old" / EXPORT.file).write_text(json.dumps({**sealed, "version": 0}))
    with pytest.raises(UserError, match="version 0"):
        Predictor.load(tmp_path / "old")
    facts = EXPORT.read(Store(export))
    for other in ({"hidden": facts["shape"]["hidden"] + 8}, {"another_key": 1}):
        EXPORT.write(Store(tmp_path / "old"), {**facts, "shape": {**facts["shape"], **other}})
        with pytest.raises(UserError, match="do not fit this code's model"):
            Predictor.load(tmp_path / "old")


def test_keys_are_the_same_users_whatever_their_type(shop, export, tmp_path):
    half = shop.frame[: len(shop.frame) // 2]
    half.astype({"user": float}).to_parquet(tmp_path / "a.parquet")
    shop.frame[len(half) :].astype({"user": str}).to_parquet(tmp_path / "b.parquet")
    got, _ = predict(export, [tmp_path], tmp_path / "out" / "file.parquet")
    whole, _ = predict(export, [shop.folder / "log.parquet"], tmp_path / "whole")
    assert got["items"].map(list).equals(whole["items"].map(list))
