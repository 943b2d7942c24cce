"""A search space in YAML, in the shape that users of W&B sweeps know, to a checked SweepSpec.

Enters: a file and overrides (`budget.total_flops=1e12`). Leaves: a frozen SweepSpec, or one line that names file, key,
fault and fix. Nothing here opens data or starts Ray; whether the space is feasible on a log is `bfm.sweep.space.space`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bfm.errors import UserError
from bfm.objective.methods import check_method
from bfm.sweep.space.measured import check_axis
from bfm.sweep.space.metric import known
from bfm.sweep.space.parameters import check_finite
from bfm.sweep.space.settings import SweepSpec
from bfm.sweep.space.words import SPACE
from bfm.training.config import TrainConfig
from bfm.training.schedule import MIN_STEPS
from bfm.units import format_flops
from bfm.yaml import load_yaml, parse_yaml, validate


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Read a search space. `overrides` are `dotted.key=value` with the value in YAML. Raises UserError."""
    values = load_yaml(path)
    for override in overrides:
        _override(values, override)
    return from_dict(values, file=str(path))


def from_dict(values: Mapping[str, Any], *, file: str | None = None) -> SweepSpec:
    """A checked SweepSpec from the YAML form (also from `SweepSpec.as_dict`). Raises UserError naming `file`."""
    try:
        spec = validate(SweepSpec, values, words=SPACE)
        for check in (_check_names, _check_method, _check_tiers, _check_probes, _check_cap):
            check(spec)
        check_axis(spec.axis, spec.parameters, spec.budget.ladder_flops, bool(spec.probes))
    except UserError as error:
        raise type(error)(error.what, file=file, key=error.key, fix=error.fix) from None
    return spec


def check_name(name: str, key: str) -> None:
    """Raises UserError where a sweep or study of this name could not have its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(f"{name!r} cannot name a folder", key=key, fix="use letters, digits, '.', '-' and '_'")


def json_schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(SweepSpec).json_schema()}


def config_schema() -> dict[str, Any]:
    """The JSON schema of one configuration's file, as `bfm train` takes it."""
    words = _docstrings(TrainConfig)
    properties = {}
    for option in dataclasses.fields(TrainConfig):
        told = dict(option.metadata["schema"])
        if option.default is None:
            told["type"] = [*told["type"], "null"]
        properties[option.name] = {**told, **({"description": words[option.name]} if option.name in words else {})}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bfm train",
        "type": "object",
        "properties": properties,
        "required": ["params"],
        "additionalProperties": False,
    }


def _docstrings(kind: type) -> dict[str, str]:
    """Name -> the text that stands under a field of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for field, below in itertools.pairwise(ast.iter_child_nodes(definition)):
        told = below.value if isinstance(below, ast.Expr) else None
        if isinstance(field, ast.AnnAssign) and isinstance(told, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(told.value).split())
    return found


def _check_names(spec: SweepSpec) -> None:
    check_name(spec.name, "name")
    try:
        known(spec.metric.name)
    except UserError as error:
        raise UserError(error.what, key="metric.name", fix=error.fix) from None


def _check_method(spec: SweepSpec) -> None:
    scheduler, num_rungs = spec.scheduler, len(spec.budget.ladder_flops)
    if scheduler.type in ("random", "grid") and spec.method != scheduler.type:
        raise UserError(
            f"{scheduler.type} trains points of {spec.method} proposals to the end",
            key="scheduler.type",
            fix=f"write method: {scheduler.type}, or another type",
        )
    if scheduler.shares is not None and len(scheduler.shares) != num_rungs:
        what = f"{len(scheduler.shares)} shares for {num_rungs} rungs"
        raise UserError(what, key="scheduler.shares", fix="give one per rung")
    if spec.method == "grid":
        check_finite(spec.parameters)


def _check_tiers(spec: SweepSpec) -> None:
    tiers, top = spec.scaling.tiers, spec.budget.ladder_flops[-1]
    if not tiers or tiers[0][0].from_rung_flops > 0 or tiers[0][0].from_params > 0:
        raise UserError(
            "small tasks have no tier", key="scaling.tiers", fix="let the first tier have no from_ thresholds"
        )
    freezes = spec.stage1 is not None or any(
        parameter.name == "freeze_at_flops" and None not in parameter.values for parameter in spec.parameters
    )
    for place, alternatives in enumerate(tiers):
        key = f"scaling.tiers.{place}"
        for tier in alternatives:
            check_method(tier.softmax, freezes=freezes, workers=tier.workers, cuda=tier.gpus > 0, key=f"{key}.softmax")
        if alternatives[0].from_rung_flops > top:
            raise UserError(
                f"no rung reaches it (the top is {format_flops(top)})",
                key=f"{key}.from_rung_flops",
                fix="lower it, or leave the tier out",
            )


def _check_probes(spec: SweepSpec) -> None:
    if not spec.probes:
        return
    longest = (1 - spec.cooldown_fractions[0]) * spec.budget.ladder_flops[-1]
    if spec.probes[0] <= 0 or spec.probes[-1] > longest:
        raise UserError(
            "lie outside every trunk", key="probes", fix=f"write C above 0 and up to {format_flops(longest)}"
        )
    for parameter in spec.parameters:
        if parameter.name == "averaging" and False in parameter.values:
            raise UserError("probes need averaged weights", key="parameters.averaging", fix="write value: true")


def _check_cap(spec: SweepSpec) -> None:
    budget = spec.budget
    needed = spec.ascent_flops(spec.cooldown_fractions[1], len(budget.ladder_flops) - 1)
    if needed > budget.total_flops:
        raise UserError(
            f"{format_flops(budget.total_flops)} cannot pay for one trial up to the top rung ({format_flops(needed)})",
            key="budget.total_flops",
            fix=f"raise it to at least {format_flops(needed)}, or lower the ladder",
        )
    if budget.ladder_flops[0] < MIN_STEPS:
        raise UserError(
            f"a rung takes at least {MIN_STEPS} steps", key="budget.ladder_flops", fix="raise the first rung"
        )


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"{override!r} is not KEY=VALUE", file="--set", fix="write e.g. budget.total_flops=1e12")
    value = parse_yaml(f"value: {text}", file=f"--set {override}")["value"]
    *parents, last = dotted.split(".")
    here: Any = values
    for part in parents:
        here = here[_index(here, part, dotted)] if isinstance(here, list) else here.setdefault(part, {})
        if not isinstance(here, (dict, list)):
            raise UserError("leads through a value", file="--set", key=dotted, fix=f"set {part!r} itself")
    here[_index(here, last, dotted) if isinstance(here, list) else last] = value


def _index(values: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise UserError(
            f"{part!r} is no place in a list of {len(values)}", file="--set", key=dotted, fix="count from 0"
        )
    return int(part)
