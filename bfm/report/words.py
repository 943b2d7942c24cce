"""Names and counts in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def plural(count: int, noun: str) -> str:
    """1 -> '1 row'; 2 -> '2 rows'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def joined_words(words: Sequence[str]) -> str:
    """All: 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def first_words(words: Sequence[str], most: int) -> str:
    """The first few, and how many more: 'a, b and 7 more'."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return f"{', '.join(words[:most])}{more}"
