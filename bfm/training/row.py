"""What a ledger row says about the model, the training and the machine; the task adds what is its own.

In: a trainer at the end of its work and the evaluation. Out: a JSON-able dict.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

import bfm
from bfm.model.flops import FLOPS_VERSION
from bfm.ranking.metrics import Evaluation, QueryScores, summarise
from bfm.training.engine import compute_dtype
from bfm.training.loop import Trainer


@functools.cache
def code_version() -> str:
    """Version and content of the code: `0.1.0+` and a hash of bfm's sources."""
    root = Path(bfm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return f"{bfm.__version__}+{digest.hexdigest()[:12]}"


def build_row(trainer: Trainer, scores: QueryScores | None) -> dict[str, Any]:
    """Counts, metrics and identity of the run as it stands; no metrics where nothing was scored."""
    evaluation = Evaluation({}, {}) if scores is None else summarise(scores)
    counters, config, factory = trainer.counters, trainer.config, trainer.factory
    shape, cost, data = config.shape(), trainer.cost, trainer.data
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
        "eval_flops": 0 if scores is None else scores.eval_flops,
        "hardware_flops": counters.hardware_flops,
        "useful_attention_flops": counters.useful_attention_flops,
        "undeduplicated_flops": counters.undeduplicated_flops,
        "steps": counters.step,
        "events": counters.events,
        "unique_events": unique_events,
        "epochs": counters.events / max(unique_events, 1),
        "batch_events": counters.events / max(counters.step, 1),
        "groups": counters.cursor,
        "metrics": evaluation.metrics,
        "errors": evaluation.errors,
        "code_version": code_version(),
        "flops_version": FLOPS_VERSION,
        "protocol_hash": data.protocol.hash,
        "shards_hash": data.shards.hash,
        "engine": factory.name,
        "workers": factory.world_size,
        "zero_stage": factory.zero_stage,
        "device": _device_name(factory.device),
        "dtype": str(compute_dtype(factory.device)).removeprefix("torch."),
        "micro_groups": trainer.micro_groups,
        "softmax": trainer.softmax,
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
