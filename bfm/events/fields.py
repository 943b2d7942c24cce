"""What a field is after fitting: the contract between prepared shards and the model's field encoders.

Encoded arrays have one row per item (item fields) or per event (context fields):

| kind        | dtype, shape     | meaning                                                                  |
|-------------|------------------|--------------------------------------------------------------------------|
| categorical | int32 [n]        | 0 missing, 1 unknown, 2.. by falling training frequency                  |
| hashed      | int32 [n, 2]     | two independent 64-bit hashes into one table of `rows`; (0, 0) missing   |
| text, list  | int32 [n, M]     | bag of ids, padded with 0                                                |
| numeric     | float32 [n]      | the raw value, NaN where missing; `edges`, `mean`, `std` describe it     |
| vector      | float32 [n, dim] | the raw vector, zeros where missing                                      |
| time        | int64 [n]        | milliseconds since the epoch                                             |
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["item", "context"]
Kind = Literal["categorical", "hashed", "numeric", "text", "list", "vector", "time"]


@dataclass(frozen=True)
class FittedField:
    """One field as fitted on the training range."""

    name: str
    side: Side
    kind: Kind
    rows: int = 0
    """Table rows of categorical, hashed, text and list fields (ids are below it); 0 for the others."""
    columns: int = 1
    """Trailing dimension of the encoded array: 2 for hashed, M for text and list, dim for vector, else 1."""
    edges: tuple[float, ...] = ()
    """Numeric: inner quantile edges of x' = sign(x) log(1 + |x|), strictly increasing, at most 31."""
    mean: float = 0.0
    """Numeric: mean of x'."""
    std: float = 1.0
    """Numeric: standard deviation of x' (1 where constant)."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FittedField:
        """Inverse of `as_dict`."""
        return cls(**{**values, "edges": tuple(values["edges"])})
