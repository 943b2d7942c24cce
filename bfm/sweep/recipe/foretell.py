"""A recipe for people and programs: made from a folder of sweeps, as text for a terminal, as report/recipe.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bfm.errors import UserError
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import Store
from bfm.sweep.recipe.evidence import Swept, read_evidence
from bfm.sweep.recipe.recipe import Recipe, make_recipe
from bfm.sweep.recipe.verdicts import check_text, range_text
from bfm.sweep.space.costs import Costs
from bfm.training.config import TrainConfig
from bfm.units import format_count, format_flops


def foretell(folder: str, flops: float, metric: str | None, shards: str | None) -> tuple[Recipe, Swept, str]:
    """(recipe, the sweep of sizes that it rests on, its shard set). Raises as `read_evidence` and `make_recipe`."""
    evidence = read_evidence(folder)
    sizes = evidence.sizes
    place = shards or sizes.spec.data.shards
    try:
        opened = Shards.open(place)
    except UserError as error:
        raise UserError(error.what, file=place, key="--shards", fix="name the sweep's shard set") from error
    costs = Costs.on(opened, Protocol.load(opened), sizes.spec.data.evaluation_queries)
    return make_recipe(evidence, costs, flops, metric), sizes, place


def publish_recipe(folder: str, recipe: Recipe, check: Mapping[str, Any] | None) -> None:
    """Write report/recipe.json; `check` is null until the recipe was trained."""
    value = {**recipe.as_dict(), "check": check}
    data = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode()
    Store(folder).child("report").put("recipe.json", data + b"\n")


def recipe_text(recipe: Recipe, check: Mapping[str, Any] | None) -> str:
    """For a terminal."""
    shape = recipe.shape
    size = range_text(recipe.params, format_count)
    if not recipe.params.low <= recipe.params.estimate <= recipe.params.high:
        size = format_count(recipe.params.estimate)
    widths = f"width {shape['width']}, depth {shape['depth']}, embedder {shape['embedder_kind']}"
    epochs = f"{recipe.epochs:.3g} epoch{'s' if recipe.epochs > 1 else ''} of this log"
    positions = f"{recipe.config['groups_per_step']} groups, {format_count(recipe.batch_events)} events"
    sources = {choice.name: choice.source for choice in recipe.choices}
    lines = [
        f"recipe for {format_flops(recipe.flops)} FLOPs, to be best in {recipe.metric}",
        f"  N        {size}: {recipe.params_source}",
        f"  shape    {widths}",
        f"  s        {recipe.embedder_share:.2%}: {sources['embedder_share']}",
        f"  D        {format_count(recipe.events)} events, {epochs}, in {format_count(recipe.steps)} steps",
        f"  B        {positions}: {sources['batch']}",
        f"  K        {format_count(recipe.negatives)}: {sources['negatives']}",
        f"  rate     {recipe.learning_rate:.3g}: {sources['learning_rate']}",
        f"predicted  {recipe.metric} {range_text(recipe.predicted, _value)}: {recipe.predicted_by}",
        f"  beyond   C {recipe.flops_beyond:.3g} x the highest rung, N {recipe.params_beyond:.3g} x the largest fitted",
    ]
    noise = {"seeds": recipe.seed_noise, "evaluation": recipe.evaluation_noise}
    known = ", ".join(f"{name} {value:.2g}" for name, value in noise.items() if math.isfinite(value))
    lines += [f"  noise    {known} (standard deviations)"] if known else []
    if recipe.fresh is not None:
        lines.append(f"  fresh    {recipe.metric} {range_text(recipe.fresh, _value)} were every event seen once")
    blocks = ["\n".join(lines), _rests_text(recipe), _listed("not told by the runs", recipe.notes)]
    blocks += [_listed("warnings", recipe.warnings), "" if check is None else f"check at {check_text(check)}"]
    defaults = TrainConfig(params=1.0).as_dict()
    changed = {name: value for name, value in recipe.config.items() if value != defaults[name]}
    config = yaml.safe_dump(changed, sort_keys=False)
    return "\n\n".join([part for part in blocks if part] + [f"# for `bfm train`\n{config}".rstrip()])


def _rests_text(recipe: Recipe) -> str:
    lines = []
    for axis, rests in recipe.rests_on.items():
        runs = rests["runs"]
        shown = ", ".join(runs[:4]) + (f", ... ({len(runs)} runs)" if len(runs) > 4 else "")
        lines.append(f"  {axis.replace('_', ' ')}: {rests['sweep']}: {shown or 'no runs'}")
    return "\n".join(["rests on", *lines])


def _listed(head: str, lines: Sequence[str]) -> str:
    return "\n".join([head, *(f"  {line}" for line in lines)]) if lines else ""


def _value(value: float) -> str:
    return f"{value:.4g}"
