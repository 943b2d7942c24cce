"""Training steps of public sequential recommenders, driven from outside: the peers of `training_speed.py`.

Runs under a peer's own interpreter (bfm is not installed there): `python training_peers.py NAME`. Enters: one JSON case
a line on stdin, with the log as an .npz of (user, item), one user's events after the other. Leaves: one JSON answer a
line. Each peer brings its own data set, batches, model, loss and optimizer; only the bare loop over its batches is
ours, so that no peer pays for its trainer's logging.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Step = Callable[[], tuple[int, int]]
"""One optimizer step: real targets trained, and FLOPs executed, those on pads included (0: not known)."""
PACKAGES = {"rectools": "rectools", "replay": "replay-rec", "replay_buckets": "replay-rec", "recbole": "recbole"}
MEASURED_STEPS = 2


def build_rectools(case: dict[str, Any]) -> Step:
    """rectools' SASRec."""
    import pandas as pd
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    user, item = load_train(case)
    time_N = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(len(user)), unit="s")
    events = {Columns.User: user, Columns.Item: item, Columns.Weight: 1.0, Columns.Datetime: time_N}
    sampled = {"loss": "sampled_softmax", "n_negatives": case["negatives"]} if case["negatives"] else {}
    model = SASRecModel(
        n_blocks=case["depth"],
        n_heads=case["heads"],
        n_factors=case["width"],
        dropout_rate=case["dropout"],
        session_max_len=case["window"],
        batch_size=case["sequences"],
        deterministic=False,
        **sampled,
    )
    model._build_model_from_dataset(Dataset.construct(pd.DataFrame(events)))
    module = model.lightning_model
    optimizer = module.configure_optimizers()
    module.on_train_start()
    module.train()
    batches = forever(model.data_preparator.get_dataloader_train())

    candidates = 1 + (case["negatives"] or len(np.unique(item)))

    def step() -> tuple[int, int]:
        batch = next(batches)
        optimizer.zero_grad()
        loss = module.loss_calculator(module.get_batch_logits(batch), batch["y"], batch["yw"])
        loss.backward()
        optimizer.step()
        # Its feed-forward layer is as wide as the model; pads are scored too.
        return int((batch["y"] != 0).sum()), count_flops(case, len(batch["x"]), 6, batch["x"].numel(), candidates)

    return step


def build_replay(case: dict[str, Any], *, buckets: bool = False) -> Step:
    """replay-rec's SasRec; with `buckets` its encoder for sequences of similar length."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
    from replay.data.nn.parquet.parquet_dataset import ParquetDataset
    from replay.nn.lightning.optimizer import OptimizerFactory
    from replay.nn.loss import CESampled
    from replay.nn.sequential import SasRec
    from replay.nn.sequential.length_bucket import LengthBucketedQueryEncoder
    from replay.nn.transform import UniformNegativeSamplingTransform
    from replay.nn.transform.template.sasrec import make_default_sasrec_transforms

    user, item = load_train(case)
    codes, item = np.unique(item, return_inverse=True)
    num_items, window, width = len(codes), case["window"], case["width"]
    schema = TensorSchema(
        TensorFeatureInfo(
            "item_id",
            is_seq=True,
            feature_type=FeatureType.CATEGORICAL,
            embedding_dim=width,
            padding_value=num_items,
            cardinality=num_items,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        )
    )
    file = Path(tempfile.mkdtemp(dir=Path(case["log"]).parent)) / "sequences.parquet"
    pq.write_table(pa.table({"item_id": pa.array([part[-window - 1 :] for part in sequences(user, item)])}), file)
    transforms = make_default_sasrec_transforms(schema)["train"]
    model = SasRec.from_params(
        schema,
        embedding_dim=width,
        num_heads=case["heads"],
        num_blocks=case["depth"],
        max_sequence_length=window,
        dropout=case["dropout"],
        hidden_dim=4 * width,
    )
    if case["negatives"]:
        model.loss = CESampled()
        model.loss.logits_callback = model.get_logits
        transforms.append(UniformNegativeSamplingTransform(num_items, case["negatives"]))
    if buckets:
        model.body.encoder = LengthBucketedQueryEncoder(model.body.encoder, bucket_size=max(1, case["sequences"] // 8))
    model.train()
    optimizer = OptimizerFactory().create(model.parameters())
    batches = forever(
        ParquetDataset(
            str(file),
            metadata={"item_id": {"shape": window + 1, "padding": num_items}},
            partition_size=2**20,
            batch_size=case["sequences"],
            generator=torch.default_generator,
        )
    )
    transform = torch.nn.Sequential(*transforms)

    def step() -> tuple[int, int]:
        batch = transform(next(batches))
        optimizer.zero_grad()
        arguments = ("feature_tensors", "padding_mask", "positive_labels", "negative_labels", "target_padding_mask")
        model(**{name: batch.get(name) for name in arguments})["loss"].backward()
        optimizer.step()
        targets, (rows, _) = int(batch["target_padding_mask"].sum()), batch["padding_mask"].shape
        scored, candidates = (targets, case["negatives"] + 1) if case["negatives"] else (rows * window, num_items)
        # Buckets leave out pads that the formula would count.
        return targets, 0 if buckets else count_flops(case, rows, 12, scored, candidates)

    return step


def build_recbole(case: dict[str, Any]) -> Step:
    """RecBole's SASRec: every prefix of a history is a sequence of its own with one target."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec

    folder = Path(tempfile.mkdtemp(dir=Path(case["log"]).parent)) / "log"
    folder.mkdir()
    user, item = load_log(case)
    lines = np.column_stack([user, item, np.arange(len(user))])
    np.savetxt(
        folder / "log.inter", lines, "%d", "\t", header="user_id:token\titem_id:token\ttimestamp:float", comments=""
    )
    config = Config(
        model="SASRec",
        dataset="log",
        config_dict={
            "data_path": str(folder.parent),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": case["window"],
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
            "train_neg_sample_args": None,
            "train_batch_size": case["sequences"],
            "n_layers": case["depth"],
            "n_heads": case["heads"],
            "hidden_size": case["width"],
            "inner_size": 4 * case["width"],
            "hidden_dropout_prob": case["dropout"],
            "attn_dropout_prob": case["dropout"],
            "loss_type": "CE",
            "use_gpu": False,
            "show_progress": False,
        },
    )
    train_data = data_preparation(config, create_dataset(config))[0]
    model = SASRec(config, train_data.dataset).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    batches = forever(train_data)

    def step() -> tuple[int, int]:
        batch = next(batches)
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()
        return len(batch), count_flops(case, len(batch), 12, len(batch), model.n_items)

    return step


def load_log(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """User and item of all events."""
    log = np.load(case["log"])
    return log["user"], log["item"]


def load_train(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """User and item of the training events: all but every user's last two."""
    user, item = load_log(case)
    kept = np.zeros(len(user), bool)
    kept[:-2] = user[:-2] == user[2:]
    return user[kept], item[kept]


def sequences(user: np.ndarray, item: np.ndarray) -> list[np.ndarray]:
    """The items of each user with at least two events."""
    parts = np.split(item, np.flatnonzero(np.diff(user)) + 1)
    return [part for part in parts if len(part) > 1]


def count_flops(case: dict[str, Any], rows: int, weights: int, scored: int, candidates: int) -> int:
    """Matmul FLOPs, forward and backward, of a batch of `rows` padded sequences.

    A block has `weights` * width^2 weights and dense attention; `scored` positions meet `candidates` items each.
    """
    width, window = case["width"], case["window"]
    block = 6 * rows * window * weights * width**2 + 12 * rows * window**2 * width
    return case["depth"] * block + 6 * scored * candidates * width


def forever(batches: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from batches


def measure(step: Step, least_s: float) -> dict[str, float]:
    """Whole steps for at least so many seconds; cpu_s is the processor time of all threads."""
    targets = flops = steps = 0
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    while (elapsed_s := time.perf_counter() - begin_s) < least_s or steps < MEASURED_STEPS:
        trained, executed = step()
        targets, flops, steps = targets + trained, flops + executed, steps + 1
    cpu_s = time.process_time() - begin_cpu_s
    return {"events": targets, "flops": flops, "steps": steps, "seconds": elapsed_s, "cpu_s": cpu_s}


def serve(build: Callable[[dict[str, Any]], Step], about: dict[str, Any]) -> None:
    """Answer cases until stdin ends; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps(about), file=answers)
    built: dict[str, Step] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["case"], sort_keys=True)
        if key not in built:
            built.clear()
            built[key] = build(request["case"])
            # The first step pays for caches and allocations.
            measure(built[key], 0.0)
        print(json.dumps(measure(built[key], request["seconds"])), file=answers)


def main() -> None:
    warnings.simplefilter("ignore")
    name = sys.argv[1]
    builders = {
        "rectools": build_rectools,
        "replay": build_replay,
        "replay_buckets": lambda case: build_replay(case, buckets=True),
        "recbole": build_recbole,
    }
    package = PACKAGES[name]
    serve(builders[name], {"package": f"{package} {version(package)}", "torch": torch.__version__})


if __name__ == "__main__":
    main()
