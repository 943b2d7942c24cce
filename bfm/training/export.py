"""A checkpoint to a folder that predicts on its own (bfm/ranking/predictor.py), whole or not at all.

Enters: a checkpoint and the shard set it was trained on. Leaves: the folder, and a few facts about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bfm.errors import UserError
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.files import write_atomic
from bfm.model.flops import FLOPS_VERSION
from bfm.ranking.predictor import DTYPES, Predictor
from bfm.sealed import check_free, publish, staging
from bfm.training.checkpoint import load_model
from bfm.training.config import TrainConfig
from bfm.version import __version__

_README = """\
# {name}: an exported model

Top {few} items for every user of a log that has the columns of the training log:

    bfm predict {folder} LOG... --out predictions.parquet --k {few}

| file | what |
|---|---|
| export.json | shape, window, schema, fitted fields, versions; sha256 of the other files |
| weights.safetensors | all weights, float32 |
| catalogue.safetensors | vectors of all {items:,} items, {dtype}; the first {catalogue:,} are the catalogue |
{neighbours}| items.parquet, items/ | row i = item i: its key, its encoded fields |
| vocabulary/ | values behind the ids of fields |

{params:,} weights beside the tables, trained over {events:,} events; bfm {version}.
"""

_NEIGHBOURS_LINE = "| neighbours.npz | items that stood near each other in the training histories |\n"


def export_checkpoint(checkpoint: str, shards: str, out: Path, catalogue_dtype: str = "float32") -> dict[str, Any]:
    """Write an export into a new or empty folder, from a checkpoint (folder or URI) and the shards it was trained on.

    A catalogue of float32 ranks exactly as evaluation does; bfloat16 takes half the room. Returns facts for a summary.

    Raises UserError where the checkpoint is absent or of other shards, `out` is taken, or the type is unknown,
    CorruptError where checkpoint or shards are damaged.
    """
    if catalogue_dtype not in DTYPES:
        raise UserError(f"no type {catalogue_dtype!r}", key="--catalogue-dtype", fix=f"use {' or '.join(DTYPES)}")
    out = out.absolute()
    check_free(out)
    opened = Shards.open(shards)
    model, meta = load_model(checkpoint, opened)
    config, protocol = TrainConfig.from_dict(meta["config"]), Protocol.load(opened)
    vectors_ID = model.embed_all().to(DTYPES[catalogue_dtype])
    origin = {
        "name": opened.manifest.name,
        "shards_hash": opened.hash,
        "flops_version": FLOPS_VERSION,
        "training": {key: meta[key] for key in ("config", "seed", "counters")},
    }
    facts = {
        "params": model.shape.params,
        "items": opened.num_items,
        "catalogue": opened.num_catalogue,
        "dtype": catalogue_dtype,
    }
    words = _README.format(
        **facts,
        name=opened.manifest.name,
        folder=out.name,
        few=min(10, opened.num_catalogue),
        events=meta["counters"]["events"],
        neighbours=_NEIGHBOURS_LINE if model.neighbours else "",
        version=__version__,
    )
    with staging(out) as scratch:
        made = scratch / "export"
        write_atomic(made / "README.md", words.encode())
        Predictor(model, vectors_ID, opened, config.window, protocol.filter_seen).save(made, origin)
        publish(made, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"export": str(out), "bytes": size, **facts}
