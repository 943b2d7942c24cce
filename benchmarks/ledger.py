"""What a ledger of a long sweep costs: bytes and requests per append, requests and seconds to open it again, and what
else a driver does for every row beside its policy.

The rows are of the size of real ones, their numbers random. The ledger is written to a folder by the class that drivers
use, two appends per row as a sweep makes them, and the segments that reading needs are then copied to an S3 server on
loopback, where the requests are counted. `bfm status` is timed as a person waits for it: a process of its own. Run with
`python benchmarks/ledger.py [TRIALS]`; writes benchmarks/results/ledger.md.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import machine, publish

from bfm.doors.tensorboard import SweepWriter
from bfm.files import Store
from bfm.report.console import Leaders, row_words
from bfm.sweep.ledger.lease import Lease
from bfm.sweep.ledger.ledger import Ledger, collector_paused, read_ledger
from bfm.sweep.ledger.state import SweepState
from bfm.training.config import TrainConfig
from tests.buckets import s3_server
from tests.sweep.world import make_spec

RUNGS = 5
PLACES, WINDOW = (13_000,), 1_000
DRIVER = {
    "append": "two appends to the ledger, local disk",
    "state": "state",
    "curves": "TensorBoard, points thinned",
    "line": "the row's line on the display",
}
METRICS = ("nll", "recall@10", "ndcg@10", "mrr@10", "coverage@10", "loss_sampled")


def main(trials: int = 10_000) -> None:
    places = [place for place in PLACES if place < trials * RUNGS] + [trials * RUNGS]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as curves:
        store = Store(folder)
        took_s = _write(store, trials, places, curves)
        append_s = took_s["append"]
        size = sum(path.stat().st_size for path in store.path().rglob("*.jsonl"))
        begun_s = time.perf_counter()
        replay = read_ledger(store)
        read_s = time.perf_counter() - begun_s
        begun_s = time.perf_counter()
        with collector_paused():
            state = SweepState.fold(replay.records)
        fold_s = time.perf_counter() - begun_s
        status_s = min(_status(folder) for _ in range(3))
        requests, bytes_read = _requests(store, replay.segments)
        rows = len(state.arrivals)
    driver = [_per_row(took_s, number, place) for number, place in enumerate(places)]
    heads = [f"at {place:,} rows" for place in places]
    parts = [["part", *heads], ["---"] * (1 + len(places))] + [
        [words, *cells] for words, cells in zip([*DRIVER.values(), "sum"], zip(*driver, strict=True), strict=True)
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in parts)
    publish(
        "ledger",
        f"""# A ledger of {rows:,} rows ({trials:,} trials x {RUNGS} rungs)

| what | figure |
|---|---|
| appends | {len(append_s):,}, two per row; one storage request each |
| bytes stored per row | {size / rows:,.0f} |
| mean append on a local disk | {sum(append_s) / len(append_s) * 1e3:.2f} ms |
| slowest append (it packs half of all) | {max(append_s):.2f} s |
| requests to read it, of an object store | {requests} |
| bytes read | {bytes_read / 1e6:.1f} MB |
| read and verified | {read_s:.2f} s |
| folded into the state | {fold_s:.2f} s |
| `bfm status` as a process of its own, one core | {status_s:.2f} s |

What the driver's process does for a row beside its policy, in ms, mean of the last {WINDOW:,} rows:

{table}

A point of the curves is written where results have grown by 0.5 % (or for at most 1 % of the time).

{machine("pyarrow", "obstore")}
""",
    )


def _write(store: Store, trials: int, places: Sequence[int], curves: str) -> dict[str, list[float]]:
    """Seconds of what a driver does for every row beside its policy; curves and lines of the rows before `places`."""
    lease, leaders = Lease.acquire(store), Leaders("nll")
    ledger, state, writer, dice = Ledger(store, lease), SweepState(), SweepWriter(curves, {}), random.Random(0)
    spec = make_spec(budget={"ladder_flops": [f"{4**rung}e9" for rung in range(RUNGS)], "total_flops": "1e18"})
    took_s: dict[str, list[float]] = {name: [] for name in DRIVER}

    def timed(name: str, call: Callable[[], Any]) -> None:
        begun_s = time.perf_counter()
        call()
        took_s[name].append(time.perf_counter() - begun_s)

    def commit(records: list[dict[str, Any]]) -> None:
        timed("append", lambda: ledger.append(records))
        timed("state", lambda: [state.apply(record) for record in records])

    commit([{"kind": "opened", "epoch": 1}, {"kind": "spec", "spec": spec.as_dict(), "hash": spec.hash}])
    for number in range(trials):
        proposal = _proposal(number, dice)
        for rung in range(RUNGS):
            task = _task(proposal, rung)
            begun = {"kind": "task", "task": task, "reason": "size 1", "meant_for": 0}
            commit([*([proposal] if rung == 0 else []), begun])
            row = _row(proposal, task, dice)
            commit([{"kind": "row", "probes": [], "task_id": task["task_id"], "row": row, "memory": None}])
            rows = len(state.arrivals)
            if any(place - WINDOW < rows <= place for place in places):
                timed("curves", lambda: writer.update(state))
                timed("line", lambda row=row: row_words(row, "nll", leaders.beside(row, state)))
    writer.close()
    lease.release()
    return took_s


def _per_row(took_s: dict[str, list[float]], number: int, rows: int) -> list[str]:
    """Milliseconds per row of each part, and their sum, over the last `WINDOW` rows at a place."""
    mean_ms = []
    for name, all_s in took_s.items():
        twice = name in ("append", "state")
        first, end = (2 * (rows - WINDOW), 2 * rows) if twice else (number * WINDOW, (number + 1) * WINDOW)
        mean_ms.append(1e3 * sum(all_s[max(0, first) : end]) / WINDOW)
    return [f"{ms:.2f}" for ms in (*mean_ms, sum(mean_ms))]


def _proposal(number: int, dice: random.Random) -> dict[str, Any]:
    config = TrainConfig(params=dice.uniform(1e3, 1e6), learning_rate=dice.uniform(1e-4, 1e-2)).as_dict()
    values = {"number": number, "seed": 0, "params": round(config["params"]), "source": "random", "rejected": {}}
    return {"kind": "proposal", "trial": f"t{number:05d}", "config": config, **values}


def _task(proposal: dict[str, Any], rung: int) -> dict[str, Any]:
    trial = proposal["trial"]
    scaling = {"cpus": 0.5, "engine": "plain", "gpus": 0.0, "micro_groups": 2, "workers": 1, "zero_stage": 0}
    return {
        "task_id": f"{trial}-r{rung}-a0", "trial": trial, "rung": rung, "rung_flops": 4**rung * 10**9,
        "config": proposal["config"], "seed": 0, "resume_from": None, "from_rung": None, "probes": [],
        "reserved_flops": 4**rung * 10**9, "scaling": scaling, "stage1": None, "evaluation_queries": 2000,
    }  # fmt: skip


def _row(proposal: dict[str, Any], task: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    numbers = {name: dice.uniform(0, 9) for name in METRICS}
    shape = {f"{part}_{name}": 64 for part in ("embedder", "trunk") for name in ("width", "depth", "heads", "hidden")}
    folder = f"trials/{task['trial']}/checkpoints/rung{task['rung']}"
    names = ("batch_events", "eval_s", "train_s", "epochs", "wait_s", "read_s", "step_s", "start_s")
    counts = ("events", "groups", "steps", "stem_params", "table_params", "embedder_params", "contextualizer_params")
    return {
        **{name: task[name] for name in ("trial", "rung", "rung_flops", "seed", "config")},
        **{name: dice.uniform(0, 1e3) for name in names}, **{name: dice.randrange(10**6) for name in counts},
        "kind": "rung", "status": "ok", "params": proposal["params"], "embedder_share": 0.2, "shape": shape,
        "path_flops": task["rung_flops"], "task_flops": task["rung_flops"], "eval_flops": 10**6,
        "hardware_flops": task["rung_flops"],
        "metrics": numbers | {f"warm.{name}": numbers[name] / 3 for name in METRICS},
        "errors": {name: value / 7 for name, value in numbers.items()},
        "protocol_hash": "c5" * 32, "shards_hash": "71" * 32,
        "checkpoint": f"{folder}-trunk", "checkpoint_bytes": 14296130,
        "model": f"{folder}-model", "model_bytes": 4765912,
        "scores": None, "engine": "plain", "workers": 1, "zero_stage": 0, "device": "cpu",
        "dtype": "float32", "threads": 1, "softmax": "auto", "micro_groups": 2, "flops_version": 3,
        "code_version": "0.1.0",
    }  # fmt: skip


def _status(folder: str) -> float:
    begun_s = time.perf_counter()
    command = [sys.executable, "-c", "from bfm.cli import main; main()", "status", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    one_core = lambda: os.sched_setaffinity(0, {0})  # noqa: E731
    subprocess.run(command, check=True, capture_output=True, env=environment, preexec_fn=one_core)
    return time.perf_counter() - begun_s


def _requests(store: Store, segments: int) -> tuple[int, int]:
    """Requests and bytes of reading the ledger from an object store."""
    names, number = set(store.names(store.folders("ledger")[-1])), segments
    bytes_read = 0
    while number:
        name = f"ledger/{number // 1000:05d}/{number:08d}.jsonl"
        names.add(name)
        bytes_read += store.path(name).stat().st_size
        number &= number - 1
    with s3_server() as server:
        there = Store(server.bucket())
        for name in sorted(names):
            there.put(name, store.get(name))
        with server.counted() as requests:
            assert read_ledger(there).segments == segments
    return requests.total(), bytes_read


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
