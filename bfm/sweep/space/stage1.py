"""One stage-1 trunk for all trials of a space: what differs between them is stage 2 alone.

Enters: a space with `stage1.checkpoint` and the shards' hash. Leaves: the space with the trunk's place, its checksum
and `freeze_at_flops` where it stands, or one line that says why it cannot be shared. Its C counts in every row's path,
and in nobody's spend here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from bfm.errors import UserError
from bfm.files import absolute, parent_store
from bfm.model.flops import FLOPS_VERSION
from bfm.sweep.space.settings import Stage1, SweepSpec
from bfm.training.checkpoint import STAGE2_KEYS, load_checkpoint, read_meta
from bfm.units import format_flops

_KEY = "stage1.checkpoint"


def with_stage1(spec: SweepSpec, shards_hash: str) -> SweepSpec:
    """The space with its shared trunk looked at; the same space where it has none.

    Raises UserError where the checkpoint is absent, of other shards, seed or configuration, no stage-1 trunk, or not at
    `freeze_at_flops`; CorruptError where it is damaged.
    """
    if spec.stage1 is None:
        return spec
    place = absolute(spec.stage1.checkpoint)
    store, name = parent_store(place)
    meta = read_meta(store, name)
    _check_trunk(spec, meta, place)
    parameters = [parameter for parameter in spec.parameters if parameter.name not in STAGE2_KEYS]
    for parameter in parameters:
        if parameter.is_free:
            raise UserError(
                f"{parameter.name} varies, but all trials share one stage 1",
                key=f"parameters.{parameter.name}",
                fix=f"give it one value; only {', '.join(sorted(STAGE2_KEYS))} may vary",
            )
    freeze = {"freeze_at_flops": _stands_at(meta)}
    config = replace(spec, parameters=tuple(parameters)).config(freeze)
    known = {"shards_hash": shards_hash, "flops_version": FLOPS_VERSION}
    load_checkpoint(store, name, {"config": config.as_dict(), **known})
    return replace(spec.with_constants(freeze), stage1=Stage1(place, meta["state_sha256"]))


def _check_trunk(spec: SweepSpec, meta: dict[str, Any], place: str) -> None:
    assert spec.stage1 is not None
    if spec.stage1.sha256 not in (None, meta["state_sha256"]):
        raise UserError("another checkpoint stands there now", file=place, key=_KEY, fix="put the first one back")
    counters = meta["counters"]
    if (counters["stage"], counters["phase"]) != (1, "trunk"):
        what = "a cooled-down model" if counters["phase"] != "trunk" else "in stage 2 already"
        raise UserError(f"is {what}", file=place, key=_KEY, fix="name the trunk of a run of stage 1")
    if set(spec.seeds) != {meta["seed"]}:
        raise UserError(
            f"stage 1 was trained with seed {meta['seed']}, not {', '.join(map(str, spec.seeds))}",
            key="seeds",
            fix=f"write seeds: [{meta['seed']}]",
        )
    stands_at = _stands_at(meta)
    for parameter in spec.parameters:
        if parameter.name == "freeze_at_flops" and (parameter.is_free or parameter.values[0] != stands_at):
            raise UserError(
                f"the shared stage 1 stands at {stands_at:.0f} ({format_flops(stands_at)}) FLOPs",
                key="parameters.freeze_at_flops",
                fix="leave it out: it is taken from the checkpoint",
            )


def _stands_at(meta: dict[str, Any]) -> float:
    """The checkpoint's C as `freeze_at_flops`, never below it: above 2**53 not every whole number is a float."""
    flops = float(meta["counters"]["path_flops"])
    return flops if flops >= meta["counters"]["path_flops"] else math.nextafter(flops, math.inf)
