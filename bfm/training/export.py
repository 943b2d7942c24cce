"""A checkpoint to a folder that predicts on its own: weights, what encodes a log, and the frozen catalogue.

Enters: a checkpoint and the shard set it was trained on. Leaves: the folder that bfm.ranking.exported describes, whole
or not at all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch

import bfm
from bfm.errors import UserError
from bfm.events.encoding import Encoding
from bfm.events.protocol import Protocol
from bfm.events.shards import Shards
from bfm.events.staging import publish, staging
from bfm.files import Store, parent_store, write_atomic
from bfm.model.flops import FLOPS_VERSION
from bfm.objective.catalogue import DTYPES, FrozenCatalogue
from bfm.ranking.exported import CATALOGUE, NEIGHBOURS, README, WEIGHTS, seal
from bfm.training.checkpoint import read_meta
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.rung import load_model

_README = """\
# {name}: an exported model

Top {few} items for every user of a log that has the columns of the training log:

    bfm predict {folder} LOG... --out predictions.parquet --k {few}

| file | what |
|---|---|
| export.json | shape, window, schema, fitted fields, versions; sha256 of the other files |
| weights.safetensors | all weights, float32 |
| catalogue.safetensors | vectors of all {items:,} items, {dtype}; the first {catalogue:,} are the catalogue |
{neighbours}| items.parquet | row i = item i: its key (key_*) and its encoded fields (encoded_*) |
| vocabulary/ | values behind the ids of fields |

{params:,} weights beside the tables, trained over {events:,} events; bfm {version}.
"""

_NEIGHBOURS_LINE = "| neighbours.npz | items that stood near each other in the training histories |\n"


def export_checkpoint(checkpoint: str, shards: str, out: Path, catalogue_dtype: str = "float32") -> dict[str, Any]:
    """Write an export.

    Args:
        checkpoint: folder or URI of a checkpoint.
        shards: the shard set it was trained on.
        out: a new or empty folder.
        catalogue_dtype: float32 ranks exactly as evaluation does; bfloat16 takes half the room.

    Returns:
        Facts for a summary.

    Raises:
        UserError: the checkpoint is absent or of other shards, `out` is taken, or the type is unknown.
        CorruptError: checkpoint or shards are damaged.
    """
    if catalogue_dtype not in DTYPES:
        raise UserError(f"no type {catalogue_dtype!r}", key="--catalogue-dtype", fix=f"use {' or '.join(DTYPES)}")
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError("exists already", file=str(out), fix="choose another folder")
    opened = Shards.open(shards)
    store, name = parent_store(checkpoint)
    model, meta = load_model(store, name, opened), read_meta(store, name)
    config, fields_hash = TrainConfig.from_dict(meta["config"]), TrainingData.of(opened).fields_hash
    encoding = Encoding.of(opened)
    catalogue = FrozenCatalogue.embed(model, fields_hash, DTYPES[catalogue_dtype])
    facts = {
        "name": opened.manifest.name,
        "shape": dataclasses.asdict(config.shape()),
        "window": config.window,
        "table_width": config.table_width,
        "filter_seen": Protocol.load(opened).filter_seen,
        "fields_hash": fields_hash,
        "encoding": {},
        "code_version": bfm.__version__,
        "flops_version": FLOPS_VERSION,
        "shards_hash": opened.hash,
        "training": {"config": config.as_dict(), "seed": meta["seed"], "counters": meta["counters"]},
    }
    words = {
        "name": opened.manifest.name,
        "folder": out.name,
        "few": min(10, encoding.catalogue),
        "items": encoding.num_items,
        "catalogue": encoding.catalogue,
        "dtype": catalogue_dtype,
        "params": config.shape().params,
        "events": meta["counters"]["events"],
        "neighbours": _NEIGHBOURS_LINE if model.neighbours else "",
        "version": bfm.__version__,
    }
    with staging(out) as scratch:
        made = scratch / "export"
        made.mkdir()
        facts["encoding"] = encoding.write(made)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(weights, made / WEIGHTS)
        catalogue.save(Store(made), CATALOGUE)
        if model.neighbours:
            write_atomic(made / NEIGHBOURS, model.neighbours.to_bytes())
        write_atomic(made / README, _README.format(**words).encode())
        seal(made, facts)
        publish(made, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"export": str(out), "bytes": size, **{key: words[key] for key in ("params", "items", "catalogue", "dtype")}}
