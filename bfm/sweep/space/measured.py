"""What a space measures: its axis, whether it can measure it, and the probes on the way.

Enters: the `axis` and `probes` keys of a space and its parameters. Leaves: probes as C, or one line that says what is
missing. A fit reads the axis from the resolved space, so one that cannot be fitted is refused before it is paid for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, WithJsonSchema

from bfm.errors import UserError
from bfm.sweep.space.parameters import Parameter
from bfm.units import parse_count, parse_number
from bfm.yaml import did_you_mean

AXES = {
    "allocation": "params",
    "embedder_share": "embedder_share",
    "batch": "groups_per_step",
    "negatives": "negatives",
}
"""Axis -> the parameter that varies along it."""
MAX_PROBES = 1000
BATCH_SPAN = 16
"""A critical batch lies between batches that are plainly too small and plainly too large."""


def check_axis(axis: str | None, parameters: Sequence[Parameter], ladder_flops: Sequence[int], probed: bool) -> None:
    """Raises UserError where a space of these parameters cannot measure what it says that it measures."""
    if axis is None:
        return
    if axis not in AXES:
        raise UserError(f"unknown axis {axis!r}", key="axis", fix=did_you_mean(axis, AXES))
    name = AXES[axis]
    parameter = next((one for one in parameters if one.name == name and one.is_free), None)
    if parameter is None:
        raise UserError(f"a space of axis {axis} varies {name}", key=f"parameters.{name}", fix="give several values")
    if axis != "batch":
        return
    low, high = parameter.ends
    if high < BATCH_SPAN * low:
        raise UserError(
            f"spans {high / low:g}x, a critical batch needs {BATCH_SPAN}x",
            key=f"parameters.{name}",
            fix=f"go from {low:g} to {BATCH_SPAN * low:g} or more",
        )
    if not probed:
        raise UserError(
            "steps and events to a target are read off probes",
            key="probes",
            fix=f"write e.g. {{count: 20, from: {ladder_flops[0] / 10:g}, to: {ladder_flops[-1] / 2:g}}}",
        )


def read_probes(value: Any) -> tuple[int, ...]:
    """C in a list, or {count, from, to}: so many on a log scale, both ends among them."""
    if isinstance(value, (list, tuple)):
        return tuple(sorted({parse_count(flops) for flops in value}))
    if not isinstance(value, Mapping) or set(value) != {"count", "from", "to"}:
        raise UserError(f"{value!r} is no list and no range of probes", fix="write {count: 20, from: 1e10, to: 1.6e11}")
    count = parse_count(value["count"], key="count")
    low, high = (parse_number(value[end], key=end) for end in ("from", "to"))
    if not 2 <= count <= MAX_PROBES or not 0 < low < high:
        raise UserError(
            f"{count} probes from {low:g} to {high:g} are no range",
            fix=f"count 2 to {MAX_PROBES}, and let `from` be above 0 and below `to`",
        )
    return tuple(sorted({round(flops) for flops in np.geomspace(low, high, count)}))


_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "string"}]}},
        {"type": "object", "required": ["count", "from", "to"]},
    ]
}
Probes = Annotated[tuple[int, ...], BeforeValidator(read_probes), WithJsonSchema(_SCHEMA)]
"""C, ascending."""
