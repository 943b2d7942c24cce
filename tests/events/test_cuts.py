"""What text and list fields lose is counted, and the schema says how much they keep."""

import pytest

from bfm.events import prepare
from bfm.events.describe import cut_lines, describe, format_description
from bfm.events.shards import Shards
from tests.events.serial import prepare_serially
from tests.events.test_stages import make_log

SCHEMA = """\
name: s
user: user
time: time
item: item
item_fields: {words: {kind: text, max_length: 3}, tags: {kind: list, separator: "|"}}
context_fields: {basket: {kind: list, separator: "|", max_length: 4}}
"""


def make_long_log():
    """Texts of 1 to 6 words, lists of 0 to 24 elements per item, of 1 to 7 per event; the last item has 30, late."""
    frame = make_log()
    frame["words"] = [" ".join(f"w{n}" for n in range(1 + item % 6)) for item in frame["item"]]
    frame["tags"] = ["|".join(f"t{n}" for n in range(item % 25)) for item in frame["item"]]
    frame["basket"] = ["|".join(f"b{n}" for n in range(1 + row % 7)) for row in range(len(frame))]
    frame.loc[frame["time"].idxmax(), ["item", "tags"]] = [999, "|".join(f"t{n}" for n in range(30))]
    return frame


@pytest.mark.parametrize("partition_rows", [1 << 18, 400])
def test_what_is_cut_is_counted_and_the_schema_sets_how_much(tmp_path, monkeypatch, partition_rows):
    monkeypatch.setattr(prepare, "PARTITION_ROWS", partition_rows)
    frame = make_long_log()
    frame.to_parquet(tmp_path / "log.parquet")
    (tmp_path / "s.yaml").write_text(SCHEMA)
    manifest = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.parquet"], tmp_path / "out")
    items = frame.drop_duplicates("item")
    expected = {
        "words": ("items", "words", 3, items["words"].str.split().str.len()),
        "tags": ("items", "elements", 16, items["tags"].str.count("t")),
        "basket": ("events", "elements", 4, frame["basket"].str.count("b")),
    }
    for name, (of, unit, kept, lengths) in expected.items():
        assert manifest.checks["cuts"][name] == {
            "of": of,
            "unit": unit,
            "kept": kept,
            "by_max_length": True,
            "values": (lengths > 0).sum(),
            "cut": (lengths > kept).sum(),
            "lost": (lengths - kept).clip(lower=0).sum(),
        }
    assert {f.name: f.columns for f in manifest.fields if f.name in expected} == {"words": 3, "tags": 16, "basket": 4}
    text = format_description(describe(Shards.open(tmp_path / "out")))
    for line in cut_lines(manifest.checks["cuts"]):
        assert f"cut            {line}" in text


def test_only_what_is_longer_than_all_of_training_is_cut_below_the_limit(tmp_path):
    make_long_log().to_parquet(tmp_path / "log.parquet")
    (tmp_path / "s.yaml").write_text(SCHEMA.replace("max_length: 3", "max_length: 6").replace("4}", "64}").replace(
        'separator: "|"}}', 'separator: "|", max_length: 64}}', 1))  # fmt: skip
    checks = prepare_serially(tmp_path / "s.yaml", [tmp_path / "log.parquet"], tmp_path / "out").checks
    late = checks["cuts"].pop("tags")
    assert (late["kept"], late["cut"], late["lost"], late["by_max_length"]) == (24, 1, 6, False)
    assert not checks["cuts"]
    assert "none in training is longer" in cut_lines({"tags": late})[0]
