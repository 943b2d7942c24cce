"""What a sweep finds where it starts: locales, long and odd paths, a clock that is set, a cluster of other versions."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray

from bfm.files import Store
from bfm.sweep.space.spec import resolve
from ray_jobs.cluster_session import local_ray, short_temp_folder
from ray_jobs.sweep import run_sweep
from tests.chaos.invariants import check_sweep
from tests.chaos.sweeps import Driver, decisions, is_in_the_middle, meanwhile, one_place
from tests.ray_jobs.toys import PAIR, SINGLE, child_environment, wait_for, write_space

SESSION = "/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
SWEEP = "from ray_jobs.sweep import main; sys.exit(main(sys.argv[1:]))"
HOURS_S = 5 * 3600.0


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", *map(str, arguments)],
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line(ended: subprocess.CompletedProcess, words: str) -> None:
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("sweep ")]
    assert line.startswith("bfm: ")
    assert words in line


@pytest.mark.parametrize("code", [SWEEP, "from bfm.cli import main; sys.argv.insert(1, 'sweep'); main()"])
def test_a_locale_that_would_find_other_files_is_one_line(tmp_path, toy_shards, code) -> None:
    folder = tmp_path / "Läufe"
    folder.mkdir()
    space = write_space(folder, folder / toy_shards.path.name)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert_one_line(python(code, space, "--storage", folder, **ascii_only), "PYTHONUTF8: this Python takes")
    # In a container's locale Python takes UTF-8 by itself, and finds that there are no shards.
    assert_one_line(python(code, space, "--storage", folder, LC_ALL="C"), toy_shards.path.name)


@pytest.mark.parametrize("name", ["short", "a-folder-" * 12, "für-"])
def test_ray_s_sockets_have_short_paths_below_every_temporary_folder(tmp_path_factory, monkeypatch, name) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix=name) as base:
        monkeypatch.setattr(tempfile, "tempdir", base)
        folder = short_temp_folder()
        assert len(os.fsencode(f"{folder}{SESSION}")) <= 107
        assert (folder.parent == Path(base)) == (name == "short")
        folder.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["a b ", "für "])
def test_a_sweep_in_long_folders_with_odd_names(tmp_path, toy_shards, name) -> None:
    """Its temporary folder is as long as Ray's sockets allow, its storage longer than they would."""
    deep = tmp_path / "Läufe vom Dienstag & 100 % Größe" / ("tief " * 20 + "unten")
    deep.mkdir(parents=True)
    pair = {**PAIR, "from_rung_flops": 3e8}
    budget = {"ladder_flops": [1.5e8, 3e8], "total_flops": 9e9, "max_trials": 1}
    space = one_place(deep, toy_shards.path, budget=budget, scaling={"slots": 1, "tiers": [SINGLE, pair]})
    with tempfile.TemporaryDirectory(dir="/tmp", prefix=name) as base:
        base += "/" + "x" * (22 - len(os.fsencode(base)))
        Path(base).mkdir()
        with Driver(space, deep, child_environment(TMPDIR=base, LC_ALL="C")) as driver:
            if name.isascii():
                driver.wait_for(lambda: list(Path(base).glob("bfm-*/session_*")), "Ray is there")
            assert driver.end() == 0, driver.said
        assert "Traceback" not in driver.said
    assert len(check_sweep(Store(deep / "tiny")).arrivals) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_clock_is_set_forward_and_back_while_a_sweep_runs(tmp_path, toy_shards, whole, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store, now = Store(tmp_path / "tiny"), time.time

    def set_clock() -> None:
        monkeypatch.setattr(time, "time", lambda: now() + HOURS_S)
        wait_for(lambda: is_in_the_middle(store, rows=2), 200, "the sweep goes on, hours later")
        monkeypatch.setattr(time, "time", lambda: now() - HOURS_S)

    with local_ray(2, dashboard=True), meanwhile(lambda: is_in_the_middle(store), set_clock):
        run_sweep(resolve(one_place(tmp_path, toy_shards.path)), str(tmp_path))
    assert not check_sweep(store).losses
    assert decisions(store) == whole


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_of_another_version_is_one_line_within_seconds(tmp_path, toy_shards, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    space = write_space(tmp_path, toy_shards.path)
    with local_ray(1, dashboard=True):
        address = ray.get_runtime_context().gcs_address
        for skew in (
            "import ray; ray.__version__ = '2.0.0'",
            "import ray, ray._private.utils as it; it.compute_version_info = lambda: (ray.__version__, '3.9.1')",
        ):
            began_s = time.monotonic()
            ended = python(f"{skew}; {SWEEP}", space, "--storage", tmp_path, RAY_ADDRESS=address, RAY_AUTH_MODE="token")
            print(f"{skew}: {time.monotonic() - began_s:.1f} s")
            assert_one_line(ended, f"The cluster was started with: Ray: {ray.__version__} Python: ")
