"""The surface on runs that others published, against what they found."""

from __future__ import annotations

import pytest

from bfm.laws.runs import from_table
from bfm.laws.surface import fit_surface
from tests.helpers import published


def chinchilla():
    columns = [("params", "N"), ("events", "D"), ("flops", "C"), ("loss", "loss")]
    return from_table(published("kyo_takano_chinchilla/df.csv"), columns)


@pytest.mark.parametrize(("delta", "objective"), [(1e-4, 2.076018e-4), (1e-3, 1.9816129e-3)])
def test_gemstones(delta, objective):
    columns = [("params", "params_active_precise"), ("events", "tokens"), ("loss", "final_loss"), ("curve", "run_name")]
    runs = from_table(published("gemstones/wandb_dfs/wandb_df_for_fitting_hot.jsonl"), columns)
    fit = fit_surface(runs, delta=delta)
    assert fit.objective == pytest.approx(objective, rel=1e-3)
    assert fit.objective <= objective


def test_chinchilla_under_hubers_loss():
    found = {name: value.estimate for name, value in fit_surface(chinchilla()).parameters.items()}
    assert found["E"] == pytest.approx(1.7839, abs=5e-5)
    assert found["A"] == pytest.approx(442.2, abs=0.05)
    assert found["B"] == pytest.approx(1271.8, abs=0.05)
    assert found["alpha"] == pytest.approx(0.3426, abs=5e-5)
    assert found["beta"] == pytest.approx(0.3420, abs=5e-5)
    assert found["a"] == pytest.approx(0.4995, abs=5e-5)


def test_chinchilla_under_the_asymmetric_error():
    fit = fit_surface(chinchilla(), objective="asym_mae")
    found = {name: value.estimate for name, value in fit.parameters.items()}
    assert fit.objective == pytest.approx(0.0227822, abs=1e-6)
    assert found["E"] == pytest.approx(1.7004, abs=1e-3)
    assert found["A"] == pytest.approx(185.4, rel=0.01)
    assert found["B"] == pytest.approx(1627, rel=0.01)
    assert found["alpha"] == pytest.approx(0.2892, abs=1e-3)
    assert found["beta"] == pytest.approx(0.3556, abs=1e-3)
    assert "bootstrap" in fit.interval_method
