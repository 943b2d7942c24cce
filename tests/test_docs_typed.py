"""What the documents tell a user to type works: on small inputs, and what needs a cluster as far as it goes without."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli as ray_command

from bfm.sweep.space.spec import resolve
from bfm.synth.log import write_synthetic
from ray_jobs import sweep
from tests.events.serial import prepare_serially
from tests.test_docs import ROOT, commands

SMALLER = {"1e13": "1e10", "1e14": "4e9", "1e6": "1e5", "5e3": "500", "2e3": "300", "20": "2"}
"""What commands ask for -> what a test has time for."""
FLOPS = {"init": "1e12", "recipe": "3e9", "train": "4e8"}
"""The same of 1e12 FLOPs: a budget that is too small has no ladder."""
SMALL_SPACE = (
    "parameters.window={value: 64}",
    "parameters.group_windows={value: 2}",
    "parameters.params={distribution: log_uniform_values, min: 5e2, max: 3e3}",
    "budget.ladder_flops=[1.2e9, 2.4e9]",
    "budget.total_flops=4e10",
    "budget.max_trials=14",
)
OVERRIDES = {"sweep": SMALL_SPACE, "simulate": ("budget.max_trials=12",)}
"""What is proposed or prepared for a cluster is run on a shorter ladder."""
SMALL_STUDY: dict[str, dict[str, Any]] = {
    "allocation_small": {
        "parameters": {"params": {"values": [500, 800, 1200, 1800, 2700, 4000]}, "group_windows": {"value": 2}},
        "budget": {"ladder_flops": [4e8, 8e8], "total_flops": 4e10, "events_per_param": [0.1, 1e5]},
    },
    "critical_batch_small": {
        "parameters": {
            "params": {"values": [500, 1000]},
            "groups_per_step": {"values": [1, 2, 4, 8, 16]},
            "group_windows": {"value": 2},
        },
        "budget": {"ladder_flops": [1.8e9], "total_flops": 5e10, "events_per_param": [0.1, 1e5]},
        "probes": {"count": 8, "from": 2e8, "to": 1.4e9},
    },
}
"""What the two spaces of docs/laws.md are replaced by, key by key."""


def shop(folder: Path) -> None:
    """The files that docs/data.md and docs/models.md speak of."""
    rng = np.random.default_rng(0)
    rows, items = 12_000, 80
    (folder / "logs").mkdir()
    log = {
        "customer_id": rng.integers(0, 250, rows),
        "created_at": rng.integers(1_600_000_000, 1_610_000_000, rows),
        "sku": rng.integers(0, items, rows),
        "quantity": rng.integers(1, 5, rows),
        "channel": rng.choice(["web", "store"], rows),
    }
    pq.write_table(pa.table(log), folder / "logs" / "a.parquet")
    pq.write_table(pa.table(log).slice(0, 500), folder / "new_log.parquet")
    products = {
        "sku": np.arange(items),
        "category": rng.choice(["tea", "toys"], items),
        "price": rng.uniform(1, 9, items),
        "title": [f"thing {item}" for item in range(items)],
        "tags": [["a", "b"][: 1 + item % 2] for item in range(items)],
    }
    pq.write_table(pa.table(products), folder / "products.parquet")
    yaml = re.search(r"```yaml\n(# shop.yaml.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    assert yaml is not None
    (folder / "shop.yaml").write_text(yaml.group(1))
    (folder / "config.yaml").write_text("params: 1e3\nembedder_share: 0.15\nwindow: 64\ngroup_windows: 2\nd_item: 16\n")


def small_study(folder: Path) -> None:
    """The spaces and the table that docs/laws.md speaks of, smaller."""
    (folder / "search_spaces").mkdir()
    for name, smaller in SMALL_STUDY.items():
        space = yaml.safe_load((ROOT / "search_spaces" / f"{name}.yaml").read_text())
        for key, values in smaller.items():
            space[key] = space[key] | values
        space["parameters"] |= {"window": {"value": 16}, "d_item": {"value": 16}, "embedder_share": {"value": 0.3}}
        space["data"]["evaluation_queries"] = 300
        (folder / "search_spaces" / f"{name}.yaml").write_text(yaml.safe_dump(space))
    rng, sizes = np.random.default_rng(0), 10
    flops = np.repeat(np.logspace(18, 21, 6), sizes)
    params = 0.1 * flops**0.5 * np.tile(np.logspace(-0.7, 0.7, sizes), 6)
    rate = 10 ** rng.uniform(-3, -2, len(flops))
    loss = 1.7 + 400 / params**0.34 + 400 / (flops / 6 / params) ** 0.28 + 0.1 * np.log(rate / 3e-3) ** 2
    table = {"N": params, "D": flops / 6 / params, "C": flops, "loss": loss + 0.003 * rng.standard_normal(len(flops))}
    settings = {"lr": rate, "optimizer": rng.choice(["adamw", "muon"], len(flops)), "kind": ["final"] * len(flops)}
    pyarrow.csv.write_csv(pa.table(table | settings | {"dropout": rng.choice([0.0, 0.1], len(flops))}), "published.csv")


def known_curves(folder: Path) -> None:
    """The table and the space that docs/spaces.md simulates."""
    shutil.copytree(ROOT / "search_spaces", folder / "search_spaces")
    rows = [
        {"config_id": f"{size:g}-{depth}", "flops": flops, "N": size, "depth": depth}
        | {"loss": 1.7 + 400 / size**0.34 + 400 / (flops / 6 / size) ** 0.28 + 0.01 * depth}
        for size in np.geomspace(1e8, 3e9, 8)
        for depth in (4, 8, 12)
        for flops in (1e19, 4e19, 1.6e20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "curves.parquet")
    (folder / "mine.yaml").write_text("params: 1.5e3\nembedder_share: 0.15\n")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Of a synthetic log, large enough for `bfm init` to find a ladder."""
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder / "log", events=100_000, users=500, items=300)
    prepare_serially(folder / "log" / "schema.yaml", [folder / "log" / "events"], folder / "shards")
    return folder / "shards"


def run(bfm, words: list[str]) -> None:
    """One command, smaller; `bfm stop` has nobody to stop."""
    smaller = SMALLER | {"1e12": FLOPS.get(words[0], "1e12")}
    words = [smaller.get(word, word) for word in words]
    of_space = "--curves" not in words
    overrides = [part for one in OVERRIDES.get(words[0], ()) if of_space for part in ("--set", one)]
    code, out, err = bfm(*words, *overrides)
    if words[0] == "stop":
        assert (code, "nobody runs this sweep" in err) == (2, True)
        return
    assert code == 0, f"bfm {' '.join(words)}\n{out}\n{err}"


def typed(bfm, *names: str) -> None:
    """Every command of some documents, in their order."""
    found = [words[1:] for name in names for words in commands(ROOT / name) if words[0] == "bfm"]
    assert len(found) >= 6
    for words in found:
        run(bfm, words)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [["README.md"], ["docs/data.md", "docs/models.md"]], ids=["tour", "shop"])
def test_from_a_log_to_a_report_and_predictions(bfm, tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    shop(tmp_path)
    typed(bfm, *names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_proposal_to_a_sweep_that_is_watched_steered_and_exported(bfm, tmp_path, monkeypatch, shards):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(shards)
    known_curves(tmp_path)
    typed(bfm, "docs/spaces.md", "docs/ledger.md", "docs/tools.md")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_study_to_laws_and_recipes(bfm, tmp_path, monkeypatch, shards):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(shards)
    small_study(tmp_path)
    typed(bfm, "docs/laws.md")


def test_what_needs_a_cluster_is_taken_by_ray_and_by_the_job(monkeypatch):
    """Ray's own command line takes its words, the job takes those behind `--`, and the space is one."""
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep, "sweep_verb", lambda **options: jobs.append(options) or 0)
    monkeypatch.chdir(ROOT)
    seen = []
    for words in commands(ROOT / "docs" / "cluster.md"):
        program, *words = [word for word in words if word not in (">", "/dev/null")]
        if Path(program).name == "ray":
            verb = ray_command
            while hasattr(verb, "commands"):
                name, *words = words
                verb = verb.commands[name]
            context = verb.make_context(name, words)
            if job := context.params.get("entrypoint"):
                RuntimeEnv(**yaml.safe_load(Path(context.params["runtime_env"]).read_text()))
                assert job[:3] == ("python", "-m", "ray_jobs.sweep")
                assert sweep.main(job[3:]) == 0
            seen.append(name)
        elif Path(program).name == "python":
            assert words[0] == "cluster/one_machine/manage.py"
            assert re.search(rf'"{words[1]}"', (ROOT / words[0]).read_text())
            seen.append(words[1])
        else:
            assert program == "export"
    assert seen == ["get-auth-token", "start", "submit", "status", "start", "submit", "stop"]
    assert [resolve(job["space"], job["overrides"]).name for job in jobs] == ["quickstart", "quickstart"]
