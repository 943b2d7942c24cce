"""Engine-neutral checkpoints: `<name>/state-<hash>.pt` with tensors, then `<name>/meta.json`, which names it.

In: engine state and JSON-able meta (configuration, seed, counters, versions). Out: the same, verified, or an error that
says what is wrong with it. A crash or a full disk leaves the checkpoint that stood before, or none, never a half one.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bfm.errors import CorruptError, UserError
from bfm.events.shards import Shards
from bfm.files import Store, parent_store, sha256_bytes
from bfm.model.flops import FLOPS_VERSION
from bfm.model.two_part import TwoPartModel
from bfm.sealed import Sealed
from bfm.training.config import TrainConfig
from bfm.training.data import TrainingData
from bfm.training.engine import EngineState

CHECKPOINT = Sealed("checkpoint", "meta.json", version=2, fix="name a folder with a meta.json of this version")
STAGE2_KEYS = frozenset({"freeze_at_flops", "negatives", "negatives_exponent"})
"""What a stage-1 trunk is not a function of, as long as it has not passed `freeze_at_flops`."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    state: EngineState
    meta: dict[str, Any]


def save_checkpoint(store: Store, name: str, state: EngineState, meta: dict[str, Any]) -> None:
    """Publish a checkpoint; one that stands under the name is replaced once this one is whole.

    Raises OSError where the disk is full; what stood before still stands then.
    """
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    data = buffer.getvalue()
    digest = sha256_bytes(data)
    state_name = _state_name(name, digest)
    store.put(state_name, data)
    CHECKPOINT.write(store, {**meta, "state_sha256": digest, "state_bytes": len(data)}, name)
    for old in store.names(name):
        if old not in (state_name, f"{name}/{CHECKPOINT.file}"):
            store.delete(old)


def _state_name(name: str, digest: str) -> str:
    return f"{name}/state-{digest[:16]}.pt"


def read_meta(store: Store, name: str) -> dict[str, Any]:
    """The meta of a checkpoint. Raises UserError where there is none, CorruptError where it was altered."""
    return CHECKPOINT.read(store, name)


def load_checkpoint(store: Store, name: str, expect: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read and verify a checkpoint.

    `expect`: keys of its meta (config, seed, shard hash, formula version) and the values they must have; of the
    configuration a stage-1 trunk may differ in what only stage 2 uses.

    Raises UserError where there is none or it is of another run, with every difference; CorruptError where it is
    truncated or altered.
    """
    meta = read_meta(store, name)
    _check_expected(f"{store.uri}/{name}", meta, expect or {})
    state_name = _state_name(name, meta["state_sha256"])
    where = f"{store.uri}/{state_name}"
    try:
        data = store.get(state_name)
    except FileNotFoundError:
        raise CorruptError(f"{where}: missing, though meta.json stands") from None
    if sha256_bytes(data) != meta["state_sha256"]:
        raise CorruptError(f"{where}: is truncated or altered (its sha256 does not fit)")
    try:
        tensors = torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise CorruptError(f"{where}: not readable ({error})") from error
    return Checkpoint(EngineState(**tensors), meta)


def run_identity(config: TrainConfig, seed: int, data: TrainingData) -> dict[str, Any]:
    """What a checkpoint's run is known by, in its meta."""
    run = {"config": config.as_dict(), "seed": seed}
    return {**run, "shards_hash": data.shards.hash, "flops_version": FLOPS_VERSION}


def resume(
    store: Store, name: str, config: TrainConfig, seed: int, data: TrainingData, *, cooled: bool = False
) -> Checkpoint:
    """Load a checkpoint of this run; a trunk's, unless `cooled` ones do as well.

    Raises UserError where it is another run's or left its trunk, CorruptError where it is damaged.
    """
    checkpoint = load_checkpoint(store, name, run_identity(config, seed, data))
    phase = checkpoint.meta["counters"]["phase"]
    if phase != "trunk" and not cooled:
        raise UserError(
            f"this is a {phase} checkpoint, training goes on from a trunk only",
            file=f"{store.uri}/{name}",
            fix="name the trunk's checkpoint",
        )
    return checkpoint


def load_model(checkpoint: str, shards: Shards) -> tuple[TwoPartModel, dict[str, Any]]:
    """The model of a checkpoint (a folder or URI), on the CPU, for evaluation, export or prediction, and its meta.

    Raises UserError where there is none or it is of another shard set, CorruptError where it is damaged.
    """
    store, name = parent_store(checkpoint)
    meta = read_meta(store, name)
    if meta["flops_version"] != FLOPS_VERSION:
        what = f"was trained by version {meta['flops_version']} of the objective, and this is {FLOPS_VERSION}"
        raise UserError(what, file=checkpoint, fix="train it again, or use the bfm that trained it")
    if (trained_on := meta["shards_hash"]) != shards.hash:
        what = f"was trained on the shard set {trained_on[:12]}, not on {shards.hash[:12]}"
        raise UserError(what, file=checkpoint, key="--shards", fix="give the shard set that it was trained on")
    found = load_checkpoint(store, name)
    config, seed = TrainConfig.from_dict(found.meta["config"]), int(found.meta["seed"])
    return TrainingData.of(shards).build_model(config, seed, found.state.weight).eval(), found.meta


def _check_expected(where: str, meta: dict[str, Any], expect: Mapping[str, Any]) -> None:
    values = [(key, meta.get(key), wanted) for key, wanted in expect.items() if key != "config"]
    if "config" in expect:
        found, config, counters = meta["config"], expect["config"], meta["counters"]
        freeze_flops = config["freeze_at_flops"]
        shared_trunk = counters["stage"] == 1 and (freeze_flops is None or counters["path_flops"] <= freeze_flops)
        keys = {*config, *found} - (STAGE2_KEYS if shared_trunk else frozenset())
        values = [(key, found.get(key), config.get(key)) for key in sorted(keys)] + values
    if differences := [f"{key} is {found}, not {wanted}" for key, found, wanted in values if found != wanted]:
        raise UserError(
            f"the checkpoint is of another run: {'; '.join(differences)}",
            file=where,
            fix="name a checkpoint of this configuration, seed and shard set",
        )
