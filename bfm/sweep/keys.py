"""What the keys of a search space are made of: numbers as people write them, sections that refuse unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from bfm.errors import UserError
from bfm.units import parse_count, parse_number

TEXT_OR_NUMBER = WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
Number = Annotated[float, BeforeValidator(parse_number), TEXT_OR_NUMBER]
Count = Annotated[int, BeforeValidator(parse_count), TEXT_OR_NUMBER]
_COUNT_OR_MORE = WithJsonSchema(
    {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "array", "items": {"type": ["number", "string"]}}]}
)
Counts = Annotated[
    list[Count], BeforeValidator(lambda value: value if isinstance(value, list) else [value]), _COUNT_OR_MORE
]


class Section(BaseModel):
    """Of the file."""

    model_config = ConfigDict(extra="forbid")


def at_least(value: int, low: int, key: str) -> int:
    """The value of a key. Raises UserError for one that is too small."""
    if value < low:
        raise UserError(f"{value} is too small", key=key, fix=f"must be at least {low}")
    return value
