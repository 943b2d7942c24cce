"""What the keys of a search space are made of: numbers as people write them, sections that refuse unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, WithJsonSchema

from bfm.errors import UserError
from bfm.units import parse_count, parse_number

SECTION = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Of every section: unknown keys are slips; the docstrings of fields are the descriptions of the JSON schema."""
_TEXT_OR_NUMBER = WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
Number = Annotated[float, BeforeValidator(parse_number), _TEXT_OR_NUMBER]
Count = Annotated[int, BeforeValidator(parse_count), _TEXT_OR_NUMBER]


def at_least(low: int) -> AfterValidator:
    """Of a Count."""

    def check(value: int) -> int:
        if value < low:
            raise UserError(f"{value} is too small", fix=f"must be at least {low}")
        return value

    return AfterValidator(check)


def _above_zero(value: float) -> float:
    if value <= 0:
        raise UserError(f"{value:g} is too small", fix="must be above 0")
    return value


Positive = Annotated[Number, AfterValidator(_above_zero)]
