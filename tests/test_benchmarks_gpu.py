"""The prepared GPU check runs: every part of it in tiny sizes on the CPU, and what cannot run is named."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import gpu
from bfm.objective.fused import fused_available

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Figures, or why there are none, by part."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        # As on a machine without it.
        patch.setitem(sys.modules, "deepspeed", None)
        gpu.main(["--tiny", "--device", "cpu", "--out", str(out)])
    results = json.loads((out / "gpu.json").read_text())["parts"]
    lines = (out / "gpu.md").read_text().splitlines()
    assert all(any(line.startswith(f"| {result['part']} |") for line in lines) for result in results)
    return {result["part"]: result.get("figures", result.get("skipped")) for result in results}


def test_every_part_has_figures_or_says_why_not(parts):
    skipped = {name: why for name, why in parts.items() if isinstance(why, str)}
    expected = {"loss: SDPA flash", "loss: SDPA cuDNN", "deepspeed"}
    if fused_available():
        expected |= {"loss: triton", "loss: triton, best tile"}
    assert skipped.keys() == expected
    assert "deepspeed" in skipped["deepspeed"]
    assert parts.keys() == gpu.PARTS.keys()


def test_goals_that_do_not_depend_on_speed_are_met(parts):
    judged = 0
    for name, figures in parts.items():
        for figure, (least, at_least) in gpu.PARTS[name].goals.items():
            if isinstance(figures, str) or figure in ("MFU", "share of the matmul peak"):
                continue
            assert gpu.met(figures[figure], least, at_least), (name, figure)
            judged += 1
    assert judged > 10


def test_the_loss_falls_and_precisions_differ(parts):
    figures = parts["precision"]
    assert figures["fall of the loss in float32, nats"] > 0
    assert figures["largest difference in nats"] > 0


def test_a_part_in_a_process_of_its_own_answers_in_one_line(tmp_path):
    setting = gpu.Setting("cpu", False, tmp_path / "nothing")
    result = gpu.run_apart("resume", setting, 60)
    assert result["part"] == "resume"
    assert "nothing" in result["skipped"]
    assert "no result" in gpu.run_apart("resume", setting, 0.1)["skipped"]
