"""`bfm recipe`: what to train with a budget that was not spent yet, and whether that came true."""

from __future__ import annotations

from typing import Annotated

import typer

from bfm.cli.common import Json, number, seed, show

app = typer.Typer()


@app.command()
def recipe(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URI of a sweep or of a study.")],
    flops: Annotated[float, number("C of the run to foretell, e.g. 1e14.", above=True)],
    metric: Annotated[str | None, typer.Option(help="Metric to be best in (default: the sweep's own).")] = None,
    shards: Annotated[str | None, typer.Option(help="The sweep's shard set, where it has moved.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Train the recipe, compare, and note the answer in the sweep's ledger.")
    ] = False,
    seed: Annotated[int, seed("Seed of the check.")] = 0,
    as_json: Json = False,
) -> None:
    """Size, share, batch, negatives, rate and data for a C, the metric it will reach with its interval, and why.

    Writes report/recipe.json into the sweep's or study's folder. The configuration is one that `bfm train` takes.
    """
    from bfm.events.protocol import Protocol
    from bfm.events.shards import Shards
    from bfm.model.matmul_peak import matmul_peak
    from bfm.report.console import Display, step_words
    from bfm.sweep.plan.machine import check_config
    from bfm.sweep.recipe.check import check_recipe, standing_check
    from bfm.sweep.recipe.foretell import foretell, publish_recipe, recipe_text
    from bfm.sweep.space.costs import Costs
    from bfm.sweep.space.tiers import Tier
    from bfm.training.config import TrainConfig
    from bfm.training.engine import EngineFactory
    from bfm.training.records import Record, StepRecord

    made, sizes, place = foretell(folder, flops, metric, shards)
    record = standing_check(made, sizes, seed)
    publish_recipe(folder, made, record)
    if check and record is None:
        device = EngineFactory().device.type
        peak, tier = matmul_peak(device), Tier(gpus=float(device == "cuda"))
        opened = Shards.open(place)
        costs = Costs.on(opened, Protocol.load(opened), None)
        check_config(TrainConfig.from_dict(made.config), costs, tier, flops, peak)
        with Display("check") as display:

            def observe(record: Record) -> None:
                if isinstance(record, StepRecord):
                    display.show(step_words(record, flops, peak), record.path_flops / flops)

            record = check_recipe(made, sizes, place, seed=seed, observer=observe)
        publish_recipe(folder, made, record)
    show({**made.as_dict(), "check": record}, as_json, lambda _: recipe_text(made, record))
