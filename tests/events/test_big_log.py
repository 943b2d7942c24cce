"""A log of 1e9 events of 1e8 users over 1e7 items is opened and iterated like a small one, in sparse files."""

import json
import os
import subprocess
import sys

import numpy as np

from bfm.events.fields import FittedField
from bfm.events.manifest import SHARD_SET, Manifest
from bfm.events.parts import KEYS
from bfm.files import Store
from tests.helpers import make_shards

ACTIVE_USERS = 100

READER = """
import json, os, resource, sys
from pathlib import Path

def private_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

from bfm.events.shards import Shards
from bfm.events.windows import WindowOrder

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
before = private_mb()
shards = Shards.open(sys.argv[1])
order = WindowOrder(shards, 512, 16, 0, targets="next_basket")
windows = [order.groups([group]) for group in (0, 1, 2**20)]
facts = [windows[0].item_RL.shape, all((of.target_RL >= 0).any() for of in windows), shards.history_length]
print(json.dumps({"handles": len(os.listdir("/proc/self/fd")), "mb": private_mb() - before, "facts": facts}))
"""


def sparse_set(folder, events, users, items):
    """A finished shard set that takes hardly any disk: all events are of the last users and of item 0."""
    tail = np.full(ACTIVE_USERS, events // ACTIVE_USERS)
    rows = {"events/item": (np.int32, events), "events/time": (np.int64, events), "items/price": (np.float32, items)}
    rows |= {f"events/context/{name}": (np.float32, events) for name in ("quantity", "discount")}
    ends = {"users/start": np.cumsum(tail), "users/train_start": np.cumsum(tail - 2)}
    ends |= {"users/train_length": tail - 2, "users/valid_length": tail - 1}
    rows |= {name: (np.int64, users + name.endswith("start")) for name in ends}
    files = {}
    for name, (dtype, length) in rows.items():
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.lib.format.open_memmap(path, "w+", dtype, (length,))
        if name in ends:
            values[-ACTIVE_USERS:] = ends[name]
        files[f"{name}.npy"] = {"bytes": path.stat().st_size, "sha256": ""}
    sides = {"price": "item", "quantity": "context", "discount": "context"}
    manifest = Manifest(
        name="sparse", seed=0, users=users, events=events, items=items, catalogue=items, has_clock=True,
        fields=tuple(FittedField(name, side, "numeric") for name, side in sides.items()),
        train_events=events - 2 * ACTIVE_USERS, train_targets=events - 3 * ACTIVE_USERS, files=files,
    )  # fmt: skip
    SHARD_SET.write(Store(folder), manifest.as_dict())


def read(folder):
    """What a process of its own, with 64 handles, found in a shard set and what it took."""
    found = subprocess.run([sys.executable, "-c", READER, str(folder)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_handles_and_private_memory_do_not_grow_with_events_users_and_items(tmp_path):
    sparse_set(tmp_path / "small", 10**6, 10**5, 10**4)
    sparse_set(tmp_path / "large", 10**9, 10**8, 10**7)
    small, large = read(tmp_path / "small"), read(tmp_path / "large")
    assert large["handles"] == small["handles"] < 20
    assert large["mb"] < small["mb"] + 10
    length = 10**9 // ACTIVE_USERS - 2
    assert large["facts"] == [[16, 512], True, length]
    on_disk = sum(path.stat().st_blocks * 512 for path in (tmp_path / "large").rglob("*.npy"))
    assert on_disk < 1 << 24


def test_as_many_handles_for_any_number_of_parts(tmp_path):
    def handles(num_parts):
        before = len(os.listdir("/proc/self/fd"))
        shards = make_shards(tmp_path / str(num_parts), users=60, num_parts=num_parts)
        return len(os.listdir("/proc/self/fd")) - before, shards

    (one, first), (many, second) = handles(1), handles(40)
    assert one == many
    files = [{**shards.manifest.files, KEYS: None} for shards in (first, second)]
    assert files[0] == files[1], "parts leave no trace but in the groups of the keys' table"
