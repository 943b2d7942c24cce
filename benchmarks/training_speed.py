"""Training events per second beside public sequential recommenders: equal width, depth, window, batch, loss and data.

    python benchmarks/training_speed.py [--short-log events.parquet] [--peer-python NAME=PATH ...] [--cache FOLDER]

Modes run in processes of their own, take turns, and count real (non-pad) targets per second over whole optimizer steps
with the making of batches; data preparation and evaluation are outside. Peers get environments of their own in the
cache folder unless an interpreter is given. Writes benchmarks/results/training_speed.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, machine, publish
from training_peers import Step, serve

PEERS = {
    "rectools": ["rectools[torch]"],
    "replay": ["replay-rec", "lightning"],
    "replay_buckets": ["replay-rec", "lightning"],
    # It uses names that NumPy 2 and pandas 3 have dropped.
    "recbole": ["recbole", "numpy<2", "pandas<2.3", "scipy<1.15"],
}
NAMES = {
    "bfm": "bfm",
    "rectools": "rectools SASRec",
    "replay": "replay SasRec",
    "replay_buckets": "replay SasRec, length buckets",
    "recbole": "RecBole SASRec",
}
DEPTH, BATCH_POSITIONS, GROUP_POSITIONS, NEGATIVES, DROPOUT = 2, 6400, 400, 128, 0.2
LONG = {"users": 1024, "items": 5000, "shortest": 208, "mean_more": 0}
SHORT = {"users": 22_000, "items": 12_000, "shortest": 5, "mean_more": 4}


@dataclass(frozen=True)
class Case:
    """One comparison; what a worker gets, paths of the log apart."""

    log: str
    width: int
    window: int
    negatives: int
    """Sampled negatives; 0: the full softmax."""
    dropout: float
    depth: int = DEPTH

    @property
    def sequences(self) -> int:
        """Sequences of `window` positions in a batch."""
        return BATCH_POSITIONS // self.window

    def request(self, folder: Path) -> dict[str, Any]:
        """JSON-able form."""
        paths = {"log": str(folder / f"{self.log}.npz"), "shards": str(folder / self.log / "shards")}
        return {**asdict(self), **paths, "sequences": self.sequences, "heads": self.width // 32}


def build_bfm(case: dict[str, Any]) -> Step:
    """The training loop on the plain engine, stage 1."""
    from bfm.events.shards import Shards
    from bfm.training.config import TrainConfig
    from bfm.training.data import TrainingData
    from bfm.training.engine import EngineFactory
    from bfm.training.loop import Trainer

    shards = Shards.open(case["shards"])
    width, window, sequences = case["width"], case["window"], case["sequences"]
    # With K the catalogue every item is a candidate: the full softmax, embedded once for one group.
    group = GROUP_POSITIONS // window if case["negatives"] else sequences
    # As many weights per block as a transformer block with a feed-forward layer of 4 widths.
    hidden = 2 * round(4 * width / 3)
    config = TrainConfig(
        params=3 * width**2 + case["depth"] * (4 * width**2 + 3 * width * hidden),
        embedder_share=0.0,
        window=window,
        group_windows=group,
        groups_per_step=sequences // group,
        d_item=width,
        table_width=width,
        depth=case["depth"],
        dropout=case["dropout"],
        live_negatives=case["negatives"] or shards.num_catalogue,
    )
    assert config.shape().width == width, "sizing chose another width"
    trainer = Trainer(config, 0, TrainingData.of(shards), EngineFactory(), micro_groups=config.groups_per_step)
    counters = trainer.counters

    def step() -> tuple[int, int]:
        events, flops = counters.events, counters.path_flops
        trainer.run_trunk(flops + trainer.next_step_flops())
        return counters.events - events, counters.path_flops - flops

    return step


def serve_bfm() -> None:
    """This process is bfm's worker."""
    import torch

    from bfm.model.matmul_peak import matmul_peak

    serve(build_bfm, {"package": f"bfm {version('bfm')}", "torch": torch.__version__, "peak": matmul_peak()})


class Worker:
    """One mode's process."""

    def __init__(self, mode: str, python: str, threads: int, folder: Path) -> None:
        script = [__file__, "--serve"] if mode == "bfm" else [str(Path(__file__).with_name("training_peers.py")), mode]
        self.mode = mode
        self.talk = folder / f"{mode}.err"
        self.process = subprocess.Popen(
            [python, *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.talk.open("w"),
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT) if mode == "bfm" else ""},
        )
        self.about = self._read()

    def measure(self, case: dict[str, Any], seconds: float) -> dict[str, float]:
        """Run the case for at least so long."""
        assert self.process.stdin is not None
        print(json.dumps({"case": case, "seconds": seconds}), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.mode} died:\n{self.talk.read_text()[-2000:]}")
        return json.loads(line)


def peer_python(mode: str, cache: Path, given: dict[str, str]) -> str:
    """The interpreter of a peer; makes its environment in the cache where none stands."""
    package = PEERS[mode][0]
    known = [given[name] for name, packages in PEERS.items() if packages[0] == package and name in given]
    if known:
        return known[0]
    folder = cache / package.split("[")[0]
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        torch = f"torch=={version('torch').split('+')[0]}"
        subprocess.run([folder / "bin" / "pip", "install", "-q", torch, *PEERS[mode]], check=True)
        (folder / "ready").touch()
    return str(folder / "bin" / "python")


def draw_log(seed: int, users: int, items: int, shortest: int, mean_more: float) -> dict[str, np.ndarray]:
    """Zipf items; histories of `shortest` events and, exponentially, more."""
    rng = np.random.default_rng(seed)
    lengths = shortest + np.floor(rng.exponential(mean_more, users)).astype(np.int64)
    weight = np.arange(1, items + 1) ** -0.8
    item = rng.choice(items, int(lengths.sum()), p=weight / weight.sum())
    return {"user": np.repeat(np.arange(users), lengths), "item": item}


def read_log(path: str) -> dict[str, np.ndarray]:
    """A log with the columns user_id, position, item_id."""
    import pyarrow.parquet as pq

    table = pq.read_table(path).sort_by([("user_id", "ascending"), ("position", "ascending")])
    return {"user": table["user_id"].to_numpy(), "item": table["item_id"].to_numpy()}


def prepare_logs(folder: Path, short_log: str | None) -> dict[str, str]:
    """Write both logs as .npz and as shards; returns what they are, in words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ray_jobs.cluster_session import local_ray
    from ray_jobs.prepare import prepare_shards

    logs = {"long": draw_log(0, **LONG), "short": read_log(short_log) if short_log else draw_log(1, **SHORT)}
    words = {}
    with local_ray(2):
        for name, log in logs.items():
            (folder / name).mkdir()
            np.savez(folder / f"{name}.npz", **log)
            users, counts = np.unique(log["user"], return_counts=True)
            position = np.concatenate([np.arange(count) for count in counts])
            pq.write_table(pa.table({**log, "position": position}), folder / name / "events.parquet")
            schema = folder / name / "schema.yaml"
            schema.write_text(
                f"name: {name}\nuser: user\nposition: position\nitem: item\nsplit: {{by: leave_one_out}}\n"
            )
            manifest = prepare_shards(
                str(schema), [str(folder / name / "events.parquet")], str(folder / name / "shards")
            )
            source = Path(short_log).parent.name if short_log and name == "short" else "synthetic"
            words[name] = (
                f"{source}, {len(users):,} users, {manifest.items:,} items, {manifest.train_targets:,} targets, "
                f"{manifest.train_targets / len(users):.1f} per user"
            )
    return words


def list_cases(widths: list[int], windows: list[int]) -> list[Case]:
    """Sampled softmax at all sizes; the full softmax, and dropout, at the first."""
    cases = []
    for log in ("long", "short"):
        cases.append(Case(log, widths[0], windows[0], negatives=0, dropout=0.0))
        cases.append(Case(log, widths[0], windows[0], NEGATIVES, DROPOUT))
        cases += [Case(log, width, window, NEGATIVES, dropout=0.0) for window in windows for width in widths]
    return cases


def compare(workers: dict[str, Worker], case: Case, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """The best of some rounds of every mode, in turns."""
    left_out = set()
    if case.negatives:
        left_out.add("recbole")  # it has no sampled softmax
    if case.log == "long":
        left_out.add("replay_buckets")  # all histories are of one length
    modes = [mode for mode in workers if mode not in left_out]
    request = case.request(folder)
    for mode in modes:
        workers[mode].measure(request, 0.0)
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode in modes:
            runs[mode].append(workers[mode].measure(request, seconds))
    best = {mode: max(answers, key=lambda run: run["events"] / run["seconds"]) for mode, answers in runs.items()}
    return {"case": asdict(case), "best": best, "load": os.getloadavg()[0]}


def table(results: list[dict[str, Any]], words: dict[str, str], peak: float, packages: list[str]) -> str:
    """The markdown of all cases."""
    lines = [
        "# Training: events per second beside public sequential recommenders",
        "",
        f"Written by `python benchmarks/training_speed.py`. Equal width, depth ({DEPTH}), window, dropout and batch "
        f"({BATCH_POSITIONS:,} positions: sequences x window). Real targets per second, best of the rounds; "
        "FLOP/s and the share of the measured matmul peak count dense matmuls, pads included. "
        f"Sampled: {NEGATIVES} negatives; bfm adds to them the distinct targets of each group of {GROUP_POSITIONS} "
        "positions. Blocks have 12 width^2 weights, rectools' 6 (its feed-forward layer is fixed). RecBole trains one "
        "target per sequence and has no sampled softmax.",
        "",
    ]
    for name, what in words.items():
        lines += [
            f"## Histories: {name} ({what})",
            "",
            "| loss | width | window | dropout | | events/s | bfm is faster by | GFLOP/s | of peak |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for result in results:
            case, best = result["case"], result["best"]
            if case["log"] != name:
                continue
            ours = best["bfm"]["events"] / best["bfm"]["seconds"]
            loss = f"sampled, K = {case['negatives']}" if case["negatives"] else "full softmax"
            for mode, run in best.items():
                rate, flops = run["events"] / run["seconds"], run["flops"] / run["seconds"]
                faster = "" if mode == "bfm" else f"{ours / rate:.2f} x"
                sizes = f"{case['width']} | {case['window']} | {case['dropout']:g}"
                work = f"{flops / 1e9:.1f} | {flops / peak:.1%}" if flops else "- | -"
                speeds = f"{rate:,.0f} | {faster} | {work}"
                lines.append(f"| {loss} | {sizes} | {NAMES[mode]} | {speeds} |")
        lines.append("")
    lines += [
        f"Matmul peak: {peak / 1e9:.0f} GFLOP/s (fp32). {', '.join(packages)}.",
        "",
        machine("torch", "numpy"),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--short-log", help="Parquet with user_id, position, item_id in place of the synthetic one")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--peers", default=",".join(PEERS), help="which peers take part")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "bfm-training-peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one round, at least")
    parser.add_argument("--widths", default="64,128")
    parser.add_argument("--windows", default="50,200")
    options = parser.parse_args()
    if options.serve:
        serve_bfm()
        return
    given = dict(entry.split("=", 1) for entry in options.peer_python)
    pythons = {mode: peer_python(mode, options.cache, given) for mode in options.peers.split(",")}
    widths, windows = ([int(value) for value in part.split(",")] for part in (options.widths, options.windows))
    cases = list_cases(widths, windows)
    with tempfile.TemporaryDirectory(prefix="bfm-training-") as name:
        folder = Path(name)
        words = prepare_logs(folder, options.short_log)
        workers = {
            mode: Worker(mode, python, options.threads, folder)
            for mode, python in {"bfm": sys.executable, **pythons}.items()
        }
        results = []
        for case in cases:
            results.append(compare(workers, case, folder, options.rounds, options.seconds))
            print(f"{case}: done", file=sys.stderr)
        for worker in workers.values():
            worker.close()
        packages = sorted({worker.about["package"] for worker in workers.values()})
        peak = workers["bfm"].about["peak"]
    text = table(results, words, peak, [*packages, f"{options.threads} threads each"])
    RESULTS.mkdir(exist_ok=True)
    whole = {"results": results, "logs": words, "peak_flops": peak, "packages": packages, "threads": options.threads}
    (RESULTS / "training_speed.json").write_text(json.dumps(whole, indent=1))
    publish("training_speed", text)


if __name__ == "__main__":
    main()
