"""What a ledger row says of a run: its size, cost and data, what identifies code and machine, what was measured.

In: a trainer as it stands, scores of queries. Out: JSON-able parts of the row that `bfm.training.rung` puts together.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from bfm.model.flops import FLOPS_VERSION
from bfm.ranking.metrics import Evaluation, QueryScores, summarise
from bfm.training.engine import compute_dtype
from bfm.training.loop import Trainer
from bfm.version import __version__


def trained(trainer: Trainer) -> dict[str, Any]:
    """What a row says of a run as it stands: counts, and what identifies the code, the data and the machine."""
    counters, config, factory = trainer.counters, trainer.config, trainer.factory
    shape, cost, data, device = config.shape(), trainer.cost, trainer.data, factory.device
    unique_events = min(counters.events, trainer.order.targets_per_epoch)
    return {
        "params": shape.params,
        "embedder_share": shape.embedder_share,
        "embedder_params": shape.embedder_params,
        "contextualizer_params": shape.contextualizer_params,
        "stem_params": cost.stem_params,
        "table_params": cost.table_params,
        "shape": shape.as_dict(),
        "path_flops": counters.path_flops,
        "hardware_flops": counters.hardware_flops,
        "useful_attention_flops": counters.useful_attention_flops,
        "undeduplicated_flops": counters.undeduplicated_flops,
        "steps": counters.step,
        "events": counters.events,
        "unique_events": unique_events,
        "epochs": counters.events / max(unique_events, 1),
        "batch_events": counters.events / max(counters.step, 1),
        "groups": counters.cursor,
        "code_version": code_version(),
        "flops_version": FLOPS_VERSION,
        "protocol_hash": data.protocol.hash,
        "shards_hash": data.shards.hash,
        "engine": factory.name,
        "workers": factory.world_size,
        "zero_stage": factory.zero_stage,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "micro_groups": trainer.micro_groups,
        "softmax": trainer.softmax,
        "threads": trainer.threads,
    }


def measured(scores: QueryScores | None) -> dict[str, Any]:
    """What a row says of an evaluation; no metrics where nothing was scored."""
    evaluation = Evaluation({}, {}) if scores is None else summarise(scores)
    eval_flops = 0 if scores is None else scores.eval_flops
    return {"eval_flops": eval_flops, "metrics": evaluation.metrics, "errors": evaluation.errors}


@functools.cache
def code_version() -> str:
    """Version and content of the code: `0.1.0+` and a hash of bfm's sources."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
