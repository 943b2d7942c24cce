"""The same rows in every format and dialect make the same shards, and every account adds up."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bfm.tables import dialect
from tests.events.serial import contents, prepare_serially

SCHEMA = """\
name: s
user: user
time: time
item: item
split: {by: leave_one_out}
context_fields: {price: numeric, shop: categorical, note: text, tone: {kind: categorical, column: note}}
"""
NAMES = ("user", "time", "item", "price", "shop", "note")
_IDS = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint64": st.integers(2**63, 2**64 - 1),
    "text": st.text("abcé0.,;|\t\"'\\ -", min_size=1, max_size=6).filter(lambda text: text.strip()),
}
_NOTES = st.text(st.sampled_from("ab é,;|\t\n\r\"'\\0.\u4e2d"), max_size=8)
_TIMES = st.one_of(st.integers(1_500_000_000, 1_500_900_000), st.sampled_from(["soon", None]))


@st.composite
def logs(draw):
    """Kind of the user's ids, and rows."""
    kind = draw(st.sampled_from(sorted(_IDS)))
    users = draw(st.lists(_IDS[kind], min_size=3, max_size=5))
    row = st.tuples(
        st.sampled_from([*users, None]),
        _TIMES,
        st.sampled_from([7, 8, 123_456_789_012, None]),
        st.one_of(st.none(), st.integers(-99_999, 99_999).map(lambda cents: cents / 100)),
        st.sampled_from(["north", 7, None]).map(lambda shop: None if shop is None else str(shop)),
        _NOTES,
    )
    sure = [(users[n % 2], 1_500_000_000 + n * 86_400, 7 + n % 2, 1.25, "north", "n") for n in range(12)]
    return kind, sure + draw(st.lists(row, max_size=30))


def as_csv(rows, separator=",", decimal=".", quoting=csv.QUOTE_MINIMAL, point="", junk=()):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator="\n")
    writer.writerow(NAMES)
    for user, time, item, price, shop, note in rows:
        price = None if price is None else str(price).replace(".", decimal)
        writer.writerow([user, time, None if item is None else f"{item}{point}", price, shop, note])
    return stream.getvalue() + "".join(f"{line}\n" for line in junk)


def as_json(rows, indent=None):
    return [json.dumps(dict(zip(NAMES, row, strict=True)), indent=indent, ensure_ascii=False) for row in rows]


def as_parquet(path, kind, rows, variant):
    user, time, item, price, shop, note = zip(*rows, strict=True)
    kinds = {"int64": pa.int64(), "uint64": pa.uint64(), "text": pa.string()}
    users = pa.array(user, kinds[kind])
    items = pa.array(item, pa.int64())
    if variant == "odd":
        texts = users.cast(pa.string())
        users = texts.dictionary_encode() if kind == "text" else pa.array(map(decimals, user), pa.decimal128(38, 10))
        items, shop = items.cast(pa.float64()), pa.array(shop).cast(pa.binary())
    times = pa.array([None if t is None else str(t) for t in time], pa.string())
    columns = [users, times, items, pa.array(price, pa.float64()), shop, pa.array(note, pa.string())]
    pq.write_table(pa.table(columns, names=list(NAMES)), path, row_group_size=7)


def decimals(number):
    return None if number is None else Decimal(number)


def write_all(folder: Path, kind, rows):
    """Name of the file -> the reason and number of further rows that are none."""
    width, plain = "wrong number of columns", "not a JSON object of plain values"
    lines = as_json(rows)
    texts = {
        "a.csv": (as_csv(rows, junk=["x"]), (width, 1)),
        "all.csv": (as_csv(rows, quoting=csv.QUOTE_ALL, point=".0"), None),
        "semicolon.csv": (as_csv(rows, ";", ",", junk=["", "x;y"]), (width, 1)),
        "pipe.csv": (as_csv(rows, "|"), None),
        "a.tsv": (as_csv(rows, "\t"), None),
        "a.jsonl": ("\n".join([*lines, "", "{", '["x"]']), (plain, 2)),
        "array.json": ("[" + ",".join([*lines, "3"]) + "]", (plain, 1)),
        "indented.json": ("\n".join(as_json(rows, indent=1)), None),
    }
    extra = {}
    for name, (text, junk) in texts.items():
        (folder / name).write_bytes(text.encode())
        extra[name] = junk
    (folder / "b.csv.gz").write_bytes(gzip.compress(texts["all.csv"][0].encode()))
    (folder / "wide.tsv").write_bytes(texts["a.tsv"][0].encode("utf-16"))
    for variant in ("plain", "odd"):
        as_parquet(folder / f"{variant}.parquet", kind, rows, variant)
    return extra | dict.fromkeys(("b.csv.gz", "wide.tsv", "plain.parquet", "odd.parquet"))


@pytest.mark.slow
@pytest.mark.timeout(900)
# A dozen preparations an example are too slow to shrink.
@settings(deadline=None, max_examples=4, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(logs(), st.sampled_from([97, 1 << 24]))
def test_every_format_and_dialect_makes_the_same_shards_and_an_account_that_adds_up(log, block):
    kind, rows = log
    before, dialect.BLOCK_BYTES = dialect.BLOCK_BYTES, block
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "s.yaml").write_text(SCHEMA)
            expected = None
            for file, junk in write_all(folder, kind, rows).items():
                manifest = prepare_serially(folder / "s.yaml", [folder / file], folder / f"out-{file}")
                reasons = dict(manifest.rows_quarantined)
                if junk:
                    assert reasons.pop(junk[0]) == junk[1], file
                assert manifest.rows_read == len(rows) + (junk[1] if junk else 0), file
                assert manifest.rows_read == manifest.events + sum(manifest.rows_quarantined.values()), file
                check_lines(folder / file, manifest)
                files = contents(folder / f"out-{file}")
                found = reasons, {n: data for n, data in files.items() if n.startswith(("events", "items", "vocab"))}
                expected = expected or found
                assert found == expected, file
    finally:
        dialect.BLOCK_BYTES = before


def check_lines(path, manifest):
    lines = dict(manifest.checks.get("lines", {}))
    if path.name in ("array.json", "indented.json") or path.suffix == ".parquet":
        assert not lines
        return
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    text = text.decode("utf-16" if path.name == "wide.tsv" else "utf-8")
    assert lines.pop("with quotes as text", 0) == 0, path.name
    assert sum(lines.values()) == text.count("\n") + (not text.endswith("\n")), path.name
    assert lines["rows"] == manifest.rows_read, path.name
