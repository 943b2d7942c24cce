import re
from pathlib import Path

import jsonschema
import pytest

from bfm.errors import UserError
from bfm.events.schema import MAX_LENGTH, EventSchema, built_in_schemas, load_schema, schema_path
from bfm.yaml import parse_yaml, validate

BASE = "name: shop\nuser: u\ntime: t\nitem: i\n"


def check(text):
    return validate(EventSchema, parse_yaml(text, file="s.yaml"), file="s.yaml")


def test_the_built_in_schemas_load():
    assert built_in_schemas() == ["complete_journey", "ids_only", "movielens", "online_retail"]
    for name in built_in_schemas():
        assert load_schema(name).name == name


def test_defaults():
    schema = check(BASE)
    assert (schema.has_clock, schema.split_by, schema.id_field) == (True, "time", True)
    assert schema.evaluation.filter_seen is None, "the log decides"
    assert schema.evaluation.queries == 10_000
    positions = check("name: s\nuser: u\nposition: p\nitem: i\n")
    assert (positions.has_clock, positions.split_by) == (False, "leave_one_out")


def test_the_json_schema_says_what_an_option_means():
    field = EventSchema.model_json_schema()["$defs"]["FieldEntry"]["properties"]["max_length"]
    assert {"type": "integer", "minimum": 1} in field["anyOf"][0]["anyOf"]
    assert all(str(length) in field["description"] for length in MAX_LENGTH.values())
    assert "power of two" in EventSchema.model_json_schema()["properties"]["hash_rows"]["description"]


SHORT = (
    BASE.replace("item: i", "item: [mcc, {column: amount, buckets: [10, 50, 100]}]")
    + "items: {path: t.csv, key: [mcc, bucket]}\n"
    + "item_fields: {brand: categorical, tags: {kind: list, separator: '|', column: tag_ids, max_length: 1k}}\n"
    + "evaluation: {queries: all}\nhash_rows: 4096\n"
    + "split: {by: time, valid_from: 2017-11-01, test_from: 2017-12-01}\n"
)


def by_editors(text):
    """Raises where an editor that goes by `bfm schema log` would mark a fault."""
    jsonschema.validate(parse_yaml(text, file="s.yaml"), EventSchema.model_json_schema())


def test_the_json_schema_takes_every_form_that_is_taken():
    by_editors(SHORT)
    by_editors("name: s\nuser: u\nposition: p\nitem: i\n")
    for name in built_in_schemas():
        by_editors(schema_path(name).read_text())
    documents = Path(__file__).parents[2] / "docs" / "data.md"
    by_editors(re.search(r"```yaml\n(# shop.yaml.*?)```", documents.read_text(), re.S).group(1))


@pytest.mark.parametrize(
    "text",
    [
        BASE + "contxt_fields: {}\n",
        BASE + "item_fields: {a: {kind: numeric, colum: x}}\n",
        BASE + "item_fields: {a: number}\n",
        BASE + "context_fields: {a: {kind: text, max_length: -8}}\n",
        BASE + "item_fields: {a: {kind: text, max_length: 1.5}}\n",
        BASE + "item_fields: {a: {kind: text, max_length: all}}\n",
        BASE + "position: p\n",
        "name: s\nuser: u\nitem: i\n",
        BASE + "evaluation: {queries: 1.5}\n",
        BASE.replace("item: i", "item: []"),
        BASE.replace("user: u\n", ""),
        BASE + "split: {by: weeks}\n",
        BASE + "read: {decimal: ';'}\n",
    ],
)
def test_the_json_schema_refuses_what_is_refused(text):
    with pytest.raises(UserError):
        check(text)
    with pytest.raises(jsonschema.ValidationError):
        by_editors(text)


def test_short_forms_are_written_out():
    schema = check(SHORT)
    assert [part.column for part in schema.item] == ["mcc", "amount"]
    assert schema.item[1].buckets == [10, 50, 100]
    assert (schema.item_fields["brand"].column, schema.item_fields["tags"].column) == ("brand", "tag_ids")
    assert (schema.item_fields["tags"].max_length, schema.item_fields["brand"].max_length) == (1000, None)
    assert schema.evaluation.queries is None
    assert schema.split.valid_from == "2017-11-01"


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        (BASE + "contxt_fields: {}\n", "contxt_fields", "did you mean 'context_fields'?"),
        (BASE + "item_fields: {a: {kind: numeric, colum: x}}\n", "item_fields.a.colum", "did you mean 'column'?"),
        (BASE + "item_fields: {a: number}\n", "item_fields.a.kind", "'numeric'"),
        (BASE + "item_fields: {a: {kind: numeric, separator: x}}\n", "item_fields.a.separator", "does not go with"),
        (BASE + "item_fields: {a: {kind: vector, max_length: 4}}\n", "item_fields.a.max_length", "text or list"),
        (BASE + "item_fields: {a: {kind: list, max_length: 0}}\n", "item_fields.a.max_length", "greater than or equal"),
        (BASE + "context_fields: {a: {kind: text, max_length: -8}}\n", "context_fields.a.max_length", "got -8"),
        (BASE + "item_fields: {a: {kind: text, max_length: 1.5}}\n", "item_fields.a.max_length", "not a whole number"),
        (BASE + "item_fields: {a: {kind: text, max_length: all}}\n", "item_fields.a.max_length", "not a number"),
        (BASE + "position: p\n", "time", "exactly one of time and position"),
        ("name: s\nuser: u\nitem: i\n", "time", "exactly one of time and position"),
        ("name: s\nuser: u\nposition: p\nitem: i\nsplit: {by: time}\n", "split.by", "leave_one_out"),
        (BASE + "item_fields: {gap: numeric}\n", "item_fields.gap", "reserved"),
        (BASE + "item_fields: {a/b: numeric}\n", "item_fields.a/b", "not a field name"),
        (BASE + "item_fields: {a: text}\ncontext_fields: {a: text}\n", "context_fields.a", "also an item field"),
        (BASE + "hash_rows: 1000\n", "hash_rows", "power of two"),
        (BASE + "hash_rows: 4294967296\n", "hash_rows", "to 2^30"),
        (BASE + "id_field: false\npopularity_field: false\n", "id_field", "no field at all"),
        (BASE + "split: {valid: 0.5, test: 0.6}\n", "split", "nothing for training"),
        (BASE + "split: {valid_from: 2017-01-01}\n", "split", "go together"),
        (BASE + "split: {by: leave_one_out, test: 0.1}\n", "split", "takes no fractions"),
        (BASE + "items: {path: t.csv, key: [a, b]}\n", "items.key", "as many columns"),
        (BASE.replace("item: i", "item: {column: a, buckets: [3, 1]}"), "item.0.buckets", "ascending"),
        (BASE.replace("item: i", "item: []"), "item", "at least 1"),
        (BASE + "evaluation: {queries: 1.5}\n", "evaluation.queries", "not a whole number"),
        (BASE.replace("user: u\n", ""), "user", "is missing"),
    ],
)
def test_a_fault_is_one_line_with_key_and_fix(text, key, expected):
    with pytest.raises(UserError) as caught:
        check(text)
    assert caught.value.key == key
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_suggests_a_built_in_one(tmp_path):
    with pytest.raises(UserError, match="did you mean 'movielens'"):
        load_schema("movielen")
    with pytest.raises(UserError, match="no such file"):
        load_schema(str(tmp_path / "absent.yaml"))
