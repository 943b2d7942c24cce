"""The schema of an event log: a YAML file in, a checked `EventSchema` out, or one line that says what is wrong.

name: shop
user: customer
time: bought_at                 # or {column, format | unit}; or `position: step` where there is no clock
item: [mcc, {column: amount, buckets: [10, 50, 100]}]     # a column, or several that together are the item
items: {path: items.parquet, key: mcc}                     # optional: a table with one row per item
item_fields: {brand: categorical, tags: {kind: list, separator: "|", max_length: 64}}
context_fields: {quantity: numeric, shop: {kind: categorical, column: shop_id}}
read: {delimiter: ";", decimal: ",", encoding: latin-1}    # where the files do not show it themselves
split: {by: time, valid: 0.1, test: 0.1}                   # or dates (valid_from, test_from); or by: leave_one_out
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bfm.errors import UserError
from bfm.tables.dialect import ReadSpec
from bfm.units import parse_count
from bfm.yaml import did_you_mean, load_yaml, validate

MAX_LENGTH = {"text": 32, "list": 16}
"""Words or elements that are kept of one value where the schema does not say."""
RESERVED = ("item_id", "popularity", "gap", "later", "clock")
_KINDS_OF_OPTION = {
    "separator": ("list", "vector"),
    "max_length": tuple(MAX_LENGTH),
    "buckets": ("categorical",),
    "format": ("time",),
}
_MAX_HASH_ROWS = 1 << 30
_BUILT_IN = Path(__file__).parent / "schemas"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _as_column(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


def _as_columns(value: Any) -> Any:
    return [_as_column(part) for part in (value if isinstance(value, list) else [value])]


def _as_names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_fields(value: Any) -> Any:
    if not isinstance(value, dict):
        return {} if value is None else value
    fields = {}
    for name, entry in value.items():
        settings = {"kind": entry} if isinstance(entry, str) else entry
        fields[name] = {"column": name, **settings} if isinstance(settings, dict) else settings
    return fields


def _as_queries(value: Any) -> Any:
    return None if value == "all" else parse_count(value)


def _ascending(buckets: list[float]) -> list[float]:
    if not buckets or any(a >= b for a, b in itertools.pairwise(buckets)):
        raise UserError("are not ascending numbers", fix="write for example [10, 50, 100]")
    return buckets


def _strptime(value: str) -> str:
    before, mark, after = value.partition("%f")
    if mark and (not before or before[-1].isalnum() or "%f" in after):
        raise UserError("%f needs a mark before it", fix="write for example %S.%f")
    return value


_Kind = Literal["categorical", "numeric", "text", "list", "vector", "time"]
_Buckets = Annotated[list[float], AfterValidator(_ascending)]
_WrittenCount = Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^[0-9][0-9_.]*([eE]\+?[0-9]+)?[kKMGTP]?$")]
_Count = Annotated[int, BeforeValidator(parse_count, json_schema_input_type=_WrittenCount)]
_Names = Annotated[list[str], BeforeValidator(_as_names, json_schema_input_type=str | list[str])]


class TimeSpec(_Strict):
    """Where the time stands and how it is written."""

    column: str
    format: Annotated[str, AfterValidator(_strptime)] | None = None
    """strptime format of text and of whole numbers, where it is not ISO 8601; %f after a mark is a fraction."""
    unit: Literal["auto", "s", "ms", "us", "ns", "days", "sheet_days"] = "auto"
    """Unit of numbers; `auto` goes by each number's size (seconds below 1e11, then milliseconds, micro, nano);
    `days` are those since 1970, `sheet_days` those that spreadsheets count from 1899-12-30."""


class ItemPart(_Strict):
    """One column of the item's key; a number may be cut into buckets."""

    column: str
    buckets: _Buckets | None = None


class FieldSpec(TimeSpec):
    """One item or context field; `format` and `unit` are those of times."""

    kind: _Kind
    separator: str | None = None
    """list, vector: what separates the elements where the column is text."""
    max_length: Annotated[_Count, Field(ge=1)] | None = None
    """text, list: only the first so many words (32 where left out) or elements (16) of a value are kept."""
    buckets: _Buckets | None = None
    """categorical: cut a number into buckets."""

    @model_validator(mode="after")
    def _fits_kind(self) -> FieldSpec:
        for option, kinds in _KINDS_OF_OPTION.items():
            if getattr(self, option) is not None and self.kind not in kinds:
                fix = f"remove it, or set kind to {' or '.join(kinds)}"
                raise UserError(f"does not go with kind {self.kind}", key=option, fix=fix)
        return self


class FieldEntry(FieldSpec):
    """As it is written: the column is the field's name where it is left out."""

    column: str | None = None  # type: ignore[assignment]


_Fields = Annotated[
    dict[str, FieldSpec], BeforeValidator(_as_fields, json_schema_input_type=dict[str, _Kind | FieldEntry] | None)
]


_Parts = Annotated[list[str | ItemPart], Field(min_length=1)]


class ItemTable(_Strict):
    """A table with one row per item, joined by key."""

    path: str
    key: _Names


class CleanSpec(_Strict):
    """What cleaning does beyond quarantine."""

    drop_duplicates: bool = False


class SplitSpec(_Strict):
    """Where training ends. Fractions are of the events, dates are of their times (UTC)."""

    by: Literal["time", "leave_one_out"] | None = None
    valid: float | None = Field(default=None, gt=0, lt=1)
    test: float | None = Field(default=None, gt=0, lt=1)
    valid_from: str | None = None
    test_from: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> SplitSpec:
        if self.by == "leave_one_out" and self.has_bounds:
            raise UserError("leave_one_out takes no fractions and no dates", fix="remove them, or use by: time")
        if (self.valid_from is None) != (self.test_from is None):
            raise UserError("valid_from and test_from go together", fix="give both")
        if self.valid_from is not None and (self.valid or self.test):
            raise UserError("fractions and dates exclude each other", fix="give one of the two")
        if sum(self.shares) >= 1:
            raise UserError("valid and test leave nothing for training", fix="let them sum to less than 1")
        return self

    @property
    def has_bounds(self) -> bool:
        """Whether fractions or dates are given."""
        return any(value is not None for value in (self.valid, self.test, self.valid_from, self.test_from))

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the events that are for validation and for the test, where no dates are given."""
        return self.valid or 0.1, self.test or 0.1


class EvaluationSpec(_Strict):
    """The evaluation protocol."""

    queries: Annotated[
        int | None, BeforeValidator(_as_queries, json_schema_input_type=_WrittenCount | Literal["all"] | None)
    ] = 10_000
    """Headline queries per part; None (written `all`) takes all of them."""
    filter_seen: bool | None = None
    """Items that the user had before are in no list; None: as the log's repeats say."""


class BuiltIn(_Strict):
    """An installed package that ships the log."""

    package: str
    log: _Names
    extra: str


class EventSchema(_Strict):
    """A checked schema."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["time"]}, {"required": ["position"]}]})

    name: str
    user: str
    time: Annotated[TimeSpec | None, BeforeValidator(_as_column, json_schema_input_type=str | TimeSpec)] = None
    position: str | None = None
    item: Annotated[
        list[ItemPart],
        Field(min_length=1),
        BeforeValidator(_as_columns, json_schema_input_type=str | ItemPart | _Parts),
    ]
    items: ItemTable | None = None
    item_fields: _Fields = Field(default_factory=dict)
    context_fields: _Fields = Field(default_factory=dict)
    read: ReadSpec | None = None
    clean: CleanSpec = CleanSpec()
    split: SplitSpec = SplitSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    hash_rows: _Count | None = None
    """Rows of the table of item ids, a power of two; left out: one per catalogue item, rounded up to a power of two."""
    id_field: bool = True
    """The item's own id as a hashed field."""
    popularity_field: bool = True
    """How often the item occurs in the training range as a numeric field: without it a model spends most of a small
    budget on learning popularity from the ids."""
    seed: int = Field(default=0, ge=0)
    builtin: BuiltIn | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EventSchema:
        if (self.time is None) == (self.position is None):
            raise UserError(
                "give exactly one of time and position", key="time", fix="name the column that orders events"
            )
        if self.position is not None and self.split.by == "time":
            fix = "use by: leave_one_out, the only split for logs with positions"
            raise UserError("positions are no clock", key="split.by", fix=fix)
        if self.position is not None and self.split.has_bounds:
            raise UserError("positions have no common clock to cut", key="split", fix="remove fractions and dates")
        for side, fields in (("item_fields", self.item_fields), ("context_fields", self.context_fields)):
            for name in fields:
                _check_name(name, side)
        for name in set(self.item_fields) & set(self.context_fields):
            raise UserError("is also an item field", key=f"context_fields.{name}", fix="rename one of the two")
        if self.items and len(self.items.key) != len(self.item):
            raise UserError("needs as many columns as item", key="items.key", fix="name one key column per item column")
        rows = self.hash_rows
        if rows is not None and (not 16 <= rows <= _MAX_HASH_ROWS or rows & (rows - 1)):
            raise UserError("is not a power of two from 16 to 2^30", key="hash_rows", fix="write for example 4096")
        if not self.id_field and not self.popularity_field and not self.item_fields:
            raise UserError("items would have no field at all", key="id_field", fix="keep it, or declare item_fields")
        return self

    @property
    def has_clock(self) -> bool:
        """Times are milliseconds since the epoch; else positions."""
        return self.time is not None

    @property
    def split_by(self) -> Literal["time", "leave_one_out"]:
        """The split, its default resolved."""
        return self.split.by or ("time" if self.has_clock else "leave_one_out")

    @property
    def number_columns(self) -> set[str]:
        """Columns that hold numbers (of times: may hold them)."""
        parts = [part.column for part in self.item if part.buckets]
        specs = [*self.item_fields.values(), *self.context_fields.values()]
        parts += [spec.column for spec in specs if spec.buckets or spec.kind in ("numeric", "time")]
        return {*parts, self.time.column if self.time else str(self.position)}


def built_in_schemas() -> list[str]:
    """Names of the schemas that come with the package."""
    return sorted(path.stem for path in _BUILT_IN.glob("*.yaml"))


def schema_path(schema: str) -> Path:
    """The file of a schema: a path, or the name of a built-in one. Raises UserError."""
    for path in (Path(schema), _BUILT_IN / f"{schema}.yaml"):
        if path.is_file():
            return path
    if Path(schema).suffix in (".yaml", ".yml"):
        raise UserError("there is no such file", file=schema, fix=f"built-in schemas: {', '.join(built_in_schemas())}")
    fix = did_you_mean(schema, built_in_schemas())
    raise UserError("is neither a file nor a built-in schema", file=schema, fix=fix)


def load_schema(schema: str) -> EventSchema:
    """Read and check a schema (a path or a built-in name). Raises UserError (file, key, what, fix)."""
    path = schema_path(schema)
    return validate(EventSchema, load_yaml(path), file=str(path))


def _check_name(name: str, side: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
        fix = "use letters, digits and underscores, and `column:` for the column's own name"
        raise UserError("is not a field name", key=f"{side}.{name}", fix=fix)
    if name in RESERVED:
        raise UserError("is a reserved name", key=f"{side}.{name}", fix=f"rename it and set `column: {name}`")
