"""How a column's times are written: ISO text and epoch numbers need no word, other formats and days have to be named.

Enters: values as they stand. Leaves: the `TimeSpec`s by which nearly all of them are times between 1980 and 2100.

Shape legend: E rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from bfm.events.schema import TimeSpec
from bfm.events.times import CLOCK_MS, times
from bfm.tables.values import keys

_SURE = 0.99
"""Share of values from which on a column is written so."""
_HEAD_ROWS = 1000
_DATES = ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y-%m-%d", "%Y.%m.%d")
# Short years with points or dashes would be versions and part numbers too.
_SHORT_DATES = ("%d/%m/%y", "%m/%d/%y")
# %b reads short and full names.
_NAMED_DATES = ("%d-%b-%Y", "%d %b %Y", "%d/%b/%Y", "%b %d, %Y", "%b %d %Y", "%d-%b-%y")
_CLOCKS = ("", " %H:%M", " %H:%M:%S", ", %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
_FORMATS = (
    *("".join(parts) for parts in itertools.product((*_DATES, *_SHORT_DATES, *_NAMED_DATES), _CLOCKS)),
    *("%Y%m%d", "%Y%m%d%H%M", "%Y%m%d%H%M%S"),
    # Web servers, mail, ctime, an API of messages.
    *("%d/%b/%Y:%H:%M:%S %z", "%a, %d %b %Y %H:%M:%S %z", "%a %b %d %H:%M:%S %Y", "%a %b %d %H:%M:%S %z %Y"),
)


def written_times(column: str, values_E: pa.Array) -> list[TimeSpec]:
    """How the values of a column can be read as times, the likeliest first; empty where they seem to be none."""
    return _fitting([TimeSpec(column=column)], values_E) or _fitting(
        [TimeSpec(column=column, format=form) for form in _FORMATS], values_E
    )


def written_days(column: str, values_E: pa.Array) -> list[TimeSpec]:
    """As `written_times` for numbers that count days; other numbers look like them too."""
    # Where both are possible, days since 1970 would lie after 2049.
    return _fitting([TimeSpec(column=column, unit="sheet_days")], values_E) or _fitting(
        [TimeSpec(column=column, unit="days")], values_E
    )


def setting(spec: TimeSpec) -> str:
    """The options of a spec as a schema writes them: `format: '%d.%m.%Y'`; empty where there are none."""
    if spec.format is not None:
        return f"format: '{spec.format}'"
    return "" if spec.unit == "auto" else f"unit: {spec.unit}"


# ---------------------------------------------------------------- inside


def _fitting(specs: Iterable[TimeSpec], values_E: pa.Array) -> list[TimeSpec]:
    """Those that fit; of several the one of the shortest span first, as dates of a log are close to each other."""
    known = keys(values_E)[0].is_valid()
    values_E = values_E.filter(known)
    if len(values_E) == 0:
        return []
    head = values_E.take(pa.array(np.linspace(0, len(values_E) - 1, _HEAD_ROWS).astype(np.int64)))
    spans = {}
    for spec in specs:
        if len(_clock_ms(head, spec)) < _SURE * _HEAD_ROWS:
            continue
        found = _clock_ms(values_E, spec)
        if len(found) >= _SURE * len(values_E) and np.ptp(found) > 0:
            spans[spec] = int(np.ptp(found))
    return sorted(spans, key=lambda spec: spans[spec])


def _clock_ms(values_E: pa.Array, spec: TimeSpec) -> np.ndarray:
    """Of the times those between 1980 and 2100, in milliseconds."""
    found = times(values_E, spec)[0].drop_null().to_numpy(zero_copy_only=False)
    return found[(found > CLOCK_MS[0]) & (found < CLOCK_MS[1])]
