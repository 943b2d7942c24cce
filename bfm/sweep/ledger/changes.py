"""What a sweep that goes on may change of its spec, and what would make its rows incomparable or its trunks useless.

Enters: the spec that the ledger holds and the one that is asked for. Leaves: the changed keys, or one line that names
the first one that is refused. A rung is an integer index, so rungs are only ever added above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from bfm.errors import UserError
from bfm.model.flops import FLOPS_VERSION
from bfm.sweep.space.parameters import Parameter, read_parameters
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.spec import from_dict

Record = Mapping[str, Any]
RESUMED = ("budget.total_flops", "budget.max_trials", "scaling.", "stage1.checkpoint", "data.shards", "loggers")
"""More to spend, other machines, other loggers, or the same trunk or shards elsewhere (`check_rows` tells whether they
are the same): no decision so far would have been another one."""
EXTENDED = (
    *RESUMED,
    "budget.ladder_flops",
    "budget.events_per_param",
    "budget.max_epochs",
    "parameters.",
    "seeds",
    "probes",
    "scheduler.",
    "method",
    "metric.others",
    "metric.constraints",
    "storage.",
    "axis",
)


def check_changes(before: Record | None, now: SweepSpec, *, extend: bool) -> list[str]:
    """The keys that differ, sorted; `before` None: there is no sweep yet. Raises UserError for the first refused."""
    if before is None:
        if extend:
            raise UserError("there is no sweep to extend", key="--extend", fix="leave it out to start one")
        return []
    old, new = _flat(before), _flat(now.as_dict())
    # A ledger from before a key was known lacks it; the defaults of such keys are None.
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    allowed = EXTENDED if extend else RESUMED
    refused = [key for key in changed if not key.startswith(allowed)]
    if refused:
        key = refused[0]
        could = not extend and all(key.startswith(EXTENDED) for key in refused)
        raise UserError(
            f"the sweep in this folder has {old.get(key)!r}, not {new.get(key)!r}"
            + (f" (also changed: {', '.join(refused[1:])})" if refused[1:] else ""),
            key=key,
            fix="add --extend to change it, or undo the change"
            if could
            else "give the changed sweep another name, or undo the change",
        )
    if extend and changed:
        _check_extension(from_dict(before), now)
    return changed


def check_rows(rows: Iterable[Record], log: Mapping[str, str]) -> None:
    """Raise UserError where a sweep's rows cannot be compared with those that would be trained now.

    `log`: shards_hash and protocol_hash of what it would be trained and scored on; what is not there is not asked for.
    """
    rows = list(rows)
    for key, wanted, what, mended in (
        (
            "flops_version",
            FLOPS_VERSION,
            "version {found} of the objective and of C, this code trains version {wanted}",
            "go on with the bfm that began it",
        ),
        (
            "shards_hash",
            log.get("shards_hash"),
            "shard set {found}, these are {wanted}",
            "name the shards it began with",
        ),
        (
            "protocol_hash",
            log.get("protocol_hash"),
            "protocol {found}, this is {wanted}",
            "name the shards it began with",
        ),
    ):
        other = Counter(row[key] for row in rows if None not in (wanted, row.get(key)) and row[key] != wanted)
        if other:
            found, count = other.most_common(1)[0]
            words = what.format(found=str(found)[:12], wanted=str(wanted)[:12])
            raise UserError(
                f"{count} rows of the sweep are of {words}",
                key="name" if key == "flops_version" else "data.shards",
                fix=f"give the sweep another name, or {mended}",
            )


def past_parameters(records: Iterable[Record]) -> list[tuple[Parameter, ...]]:
    """The parameters of every spec that a ledger holds, oldest first."""
    return [read_parameters(record["spec"]["parameters"]) for record in records if record["kind"] == "spec"]


def _check_extension(before: SweepSpec, now: SweepSpec) -> None:
    """What is allowed to change has limits of its own."""
    old_rungs, rungs = before.budget.ladder_flops, now.budget.ladder_flops
    if rungs[: len(old_rungs)] != old_rungs:
        shown = ", ".join(f"{flops:g}" for flops in old_rungs)
        raise UserError(
            "changes rungs that the sweep has rows at",
            key="budget.ladder_flops",
            fix=f"begin with {shown} and add rungs above",
        )
    if now.seeds[: len(before.seeds)] != before.seeds:
        raise UserError(
            f"{list(now.seeds)} removes or reorders the seeds of the sweep",
            key="seeds",
            fix=f"begin with {', '.join(map(str, before.seeds))} and append others",
        )
    (low, high), (new_low, new_high) = before.cooldown_fractions, now.cooldown_fractions
    if new_low > low or new_high < high:
        raise UserError(
            f"trunks of the sweep are to be cooled down over shares from {low:g} to {high:g} of a rung, "
            f"the space now has {new_low:g} to {new_high:g}",
            key="parameters.cooldown_fraction",
            fix="let the new range hold the old one",
        )
    if now.probes != before.probes and not (before.probes and now.probes):
        raise UserError(
            "trunks keep an average of their weights from the start, or never",
            key="probes",
            fix="move probes, but keep at least one" if before.probes else "leave them out, or start a sweep with them",
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        return {name: leaf for key, inner in values.items() for name, leaf in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): values}
