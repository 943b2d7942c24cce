"""A small shop: a raw log with baskets, cold items and fields of all kinds, its shard set, and a checkpoint over it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bfm.events.shards import Shards
from bfm.files import Store
from bfm.model.flops import FLOPS_VERSION
from bfm.training.checkpoint import save_checkpoint
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineState
from tests.events.serial import prepare_serially

SCHEMA = """\
name: shop
user: user
time: time
item: item
items: {path: table.parquet, key: item}
item_fields:
  colour: categorical
  price: numeric
  words: text
  tags: {kind: list, separator: "|"}
  look: vector
context_fields:
  quantity: numeric
  shop: categorical
  coupons: {kind: list, separator: "|"}
  place: vector
  due: time
"""
CONFIG = TrainConfig(params=3000, embedder_share=0.1, window=12, d_item=8, table_width=4, depth=2)
NAME = "model"


@dataclass(frozen=True)
class Shop:
    """Where everything lies, and the log as a frame (times in seconds)."""

    folder: Path
    frame: pd.DataFrame
    shards: Shards

    @property
    def checkpoint(self) -> str:
        return str(self.folder / NAME)

    def model(self):
        """That of the checkpoint, built anew."""
        return _model(self.shards)


def make_shop(folder: Path, num: int = 2400, schema: str = SCHEMA, repeats: bool = True) -> Shop:
    """60 users, about 80 items, four rows a basket; some items are first sold at the end, prices only of some.

    Without `repeats` nobody has an item twice.
    """
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    basket_user = rng.integers(0, 60, num // 4)
    day = rng.integers(0, 300, len(basket_user))
    item = np.minimum(rng.geometric(0.05, (len(basket_user), 4)), 70) + 100
    item[day > 280, 0] = 200 + day[day > 280] % 7
    frame = pd.DataFrame(
        {
            "user": np.repeat(basket_user, 4),
            "time": np.repeat(1_600_000_000 + day * 86_400, 4),
            "item": item.ravel(),
            "quantity": rng.integers(1, 5, num).astype(float),
            "shop": rng.choice(["north", "south"], num),
        }
    ).sort_values(["user", "time", "item"], ignore_index=True)
    if not repeats:
        frame = frame.drop_duplicates(["user", "item"], ignore_index=True)
    frame["step"] = frame.groupby("user").cumcount()
    frame["words"] = [f"thing number {item % 13}" for item in frame["item"]]
    frame["tags"] = [f"t{item % 5}|t{item % 3}" for item in frame["item"]]
    frame["look"] = [f"{item % 7},{item % 2}.5" for item in frame["item"]]
    frame["coupons"] = rng.choice(["a", "a|b", ""], len(frame))
    frame["place"] = [f"{x},1,{y}" for x, y in rng.integers(0, 9, (len(frame), 2))]
    frame["due"] = frame["time"] + rng.integers(0, 9, len(frame)) * 3600
    items = pd.DataFrame({"item": np.arange(100, 170), "colour": np.arange(70) % 3, "price": np.arange(70) / 7})
    items.to_parquet(folder / "table.parquet")
    (folder / "shop.yaml").write_text(schema)
    frame.to_parquet(folder / "log.parquet")
    prepare_serially(folder / "shop.yaml", [folder / "log.parquet"], folder / "shards")
    shards = Shards.open(folder / "shards")
    meta = {
        "config": CONFIG.as_dict(),
        "seed": 0,
        "counters": {"stage": 1, "phase": "cooldown", "path_flops": 0, "events": 0},
        "shards_hash": shards.hash,
        "flops_version": FLOPS_VERSION,
    }
    weights = {name: values.detach() for name, values in _model(shards).named_parameters()}
    save_checkpoint(Store(folder), NAME, EngineState(weights), meta)
    return Shop(folder, frame, shards)


def _model(shards: Shards):
    """With noise on all weights: some begin at zero, and what they multiply would go untested."""
    model = TrainingData.of(shards).build_model(CONFIG, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.2 * torch.randn(values.shape, generator=generator)
    return model.eval()
